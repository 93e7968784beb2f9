use onnx_shrink::{pass::table, passes::PASSES};

#[test]
fn the_table_of_passes_is_that_of_the_program() {
    let readme = include_str!("../../README.md");
    assert!(readme.contains(&table(PASSES)), "run `cargo xtask codegen`");
}

#[test]
fn a_pass_has_one_name_everywhere() {
    for pass in PASSES {
        let file = format!("{}/src/passes/{}.rs", env!("CARGO_MANIFEST_DIR"), pass.name.replace('-', "_"));
        let source = std::fs::read_to_string(&file).unwrap();
        let parts = pass.name.split('-').map(|part| part[..1].to_uppercase() + &part[1..]);
        let kind = format!("struct {}", parts.collect::<String>());
        assert!(source.contains(&kind), "{file} should define `{kind}`");
        assert!(pass.help().contains("Fidelity: "), "{} does not state its fidelity", pass.name);
    }
}
