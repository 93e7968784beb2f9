"""operators.py FILE: writes, for each standard operator, since when it takes how many inputs and outputs and which attributes."""

import collections
import sys

import onnx

versions = collections.defaultdict(list)
for schema in onnx.defs.get_all_schemas_with_history():
    if schema.domain == "":
        versions[schema.name].append(schema)
MOST = 2**31 - 1
lines = []
for name, schemas in sorted(versions.items()):
    told = None
    for schema in sorted(schemas, key=lambda schema: schema.since_version):
        count = lambda least, most: f"{least}-{'' if most >= MOST else most}"
        inputs = count(schema.min_input, schema.max_input)
        outputs = count(schema.min_output, schema.max_output)
        what = " ".join([inputs, outputs, *sorted(schema.attributes)])
        if what != told:
            lines.append(f"{name} {schema.since_version} {what}")
        told = what
with open(sys.argv[1], "w") as file:
    file.write("\n".join(lines) + "\n")
