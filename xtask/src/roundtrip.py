"""roundtrip.py FOLDER: writes small models that show every part of the format, each named after what it shows."""
import sys

import numpy as np
import onnx
from onnx import TensorProto as T, helper as h

folder = sys.argv[1]
FLOAT_N4 = ('float', T.FLOAT, ['n', 4])
x = h.make_tensor_value_info('x', T.FLOAT, ['n', 4])
y = h.make_tensor_value_info('y', T.FLOAT, ['n', 4])
cond = h.make_tensor_value_info('cond', T.BOOL, [])
ramp = onnx.numpy_helper.from_array(np.arange(4, dtype=np.float32), 'w')


def save(name, nodes, inputs=(x,), outputs=(y,), initializers=(), ir=8, opset=17, edit=lambda model: None, **more):
    graph = h.make_graph(list(nodes), name, list(inputs), list(outputs), list(initializers), **more)
    model = h.make_model(graph, ir_version=ir, opset_imports=[h.make_opsetid('', opset)])
    edit(model)
    with open(f'{folder}/{name}.onnx', 'wb') as file:
        file.write(model.SerializeToString())


def value(name, shape=('n', 4)):
    return h.make_tensor_value_info(name, T.FLOAT, shape)


def branch(name, op, inputs, output):
    return h.make_graph([h.make_node(op, inputs, [output])], name, [], [value(output)])


then, otherwise = branch('then', 'Add', ['x', 'w'], 't'), branch('else', 'Identity', ['x'], 'e')
inner = h.make_node('If', ['cond'], ['q'], then_branch=then, else_branch=otherwise)
save('bodies_capture_outer_values', [h.make_node('If', ['cond'], ['y'], then_branch=then, else_branch=otherwise)],
     [x, cond], initializers=[ramp])
save('bodies_nest', [h.make_node('If', ['c2'], ['y'], then_branch=h.make_graph([inner], 'mid', [], [value('q')]),
                                 else_branch=otherwise)],
     [x, cond, h.make_tensor_value_info('c2', T.BOOL, [])], initializers=[ramp])

step = h.make_graph(
    [h.make_node('Identity', ['go'], ['on']), h.make_node('Add', ['state', 'w'], ['next']),
     h.make_node('Identity', ['next'], ['row'])],
    'step', [h.make_tensor_value_info('i', T.INT64, []), h.make_tensor_value_info('go', T.BOOL, []), value('state')],
    [h.make_tensor_value_info('on', T.BOOL, []), value('next'), value('row')])
save('loops_carry_states', [h.make_node('Loop', ['count', '', 'x'], ['y', 'rows'], body=step)],
     [x, h.make_tensor_value_info('count', T.INT64, [])], [y, value('rows', ('k', 'n', 4))], [ramp])
scan = h.make_graph([h.make_node('Add', ['s', 'r'], ['s2']), h.make_node('Identity', ['s2'], ['o'])], 'scan',
                    [value('s', (4,)), value('r', (4,))], [value('s2', (4,)), value('o', (4,))])
save('scans_walk_rows', [h.make_node('Scan', ['w', 'x'], ['last', 'y'], body=scan, num_scan_inputs=1)],
     outputs=[value('last', (4,)), y], initializers=[ramp])

matrix = onnx.numpy_helper.from_array(np.arange(16, dtype=np.float32).reshape(4, 4), 'inner')
sparse = h.make_sparse_tensor(h.make_tensor('v', T.FLOAT, [2], [1, 2]), h.make_tensor('i', T.INT64, [2], [0, 3]), [4])
save('constants_of_every_spelling', [
    h.make_node('Constant', [], ['a'], value_float=1.5), h.make_node('Constant', [], ['b'], value_ints=[1, 2]),
    h.make_node('Constant', [], ['c'], value_floats=[1.0, 2.0]), h.make_node('Constant', [], ['d'], value=matrix),
    h.make_node('Constant', [], ['e'], value_string='s'), h.make_node('Constant', [], ['f'], value_int=7),
    h.make_node('Constant', [], ['g'], value_strings=['s', 't']),
    h.make_node('Constant', [], ['s'], sparse_value=sparse), h.make_node('MatMul', ['x', 'd'], ['y'])])


def functions(model):
    model.opset_import.extend([h.make_opsetid('my', 1), h.make_opsetid('other', 2)])
    twice = h.make_function('my', 'Twice', ['a'], ['b'], [h.make_node('Add', ['a', 'a'], ['b'])],
                            [h.make_opsetid('', 17)])
    leak = h.make_node('LeakyRelu', ['a'], ['b'])
    leak.attribute.append(h.make_attribute_ref('alpha', onnx.AttributeProto.FLOAT))
    leak.attribute[0].ref_attr_name = 'slope'
    leaky = h.make_function('my', 'Leaky', ['a'], ['b'], [leak], [h.make_opsetid('', 17)], ['slope'])
    leaky.attribute_proto.append(h.make_attribute('bias', 0.5))
    leaky.doc_string, leaky.overload = 'a function', 'one'
    leaky.value_info.append(value('a'))
    model.functions.extend([twice, leaky])


save('functions_and_domains', [h.make_node('Twice', ['x'], ['m'], domain='my'),
                               h.make_node('Odd', ['m'], ['y'], domain='other', k=3)], ir=10, edit=functions)
save('initializers_listed_as_inputs', [h.make_node('Add', ['x', 'w'], ['y'])], [x, value('w', (4,))],
     initializers=[ramp], ir=3, opset=9)


def metadata(model):
    model.producer_name, model.producer_version, model.domain, model.model_version = 'p', '1', 'd', 5
    model.doc_string = 'é'
    for owner in (model, model.graph, model.graph.node[0], model.graph.initializer[0], model.graph.input[0]):
        owner.metadata_props.add(key='a', value='b')
    model.graph.doc_string, model.graph.node[0].doc_string = 'd', 'n'
    model.graph.quantization_annotation.add(tensor_name='w').quant_parameter_tensor_names.add(key='SCALE_TENSOR', value='x')
    model.graph.sparse_initializer.append(h.make_sparse_tensor(
        h.make_tensor('s', T.FLOAT, [2], [1, 2]), h.make_tensor('at', T.INT64, [2], [0, 3]), [4]))


save('metadata_and_sparse', [h.make_node('Add', ['x', 'w'], ['m'], name='first'), h.make_node('Add', ['m', 's'], ['y'])],
     initializers=[ramp], ir=10, edit=metadata)


def training(model):
    info = model.training_info.add()
    info.algorithm.CopyFrom(h.make_graph([h.make_node('Neg', ['w'], ['w2'])], 'a', [], [value('w2', (4,))]))
    info.initialization.CopyFrom(h.make_graph([], 'i', [], []))
    info.update_binding.add(key='w', value='w2')
    info.initialization_binding.add(key='w', value='w2')


save('training_is_carried', [h.make_node('Add', ['x', 'w'], ['y'])], initializers=[ramp], edit=training)


def devices(model):
    model.configuration.add(name='two', num_devices=2).device.extend(['a', 'b'])
    placed = model.graph.node[0].device_configurations.add(configuration_id='two', pipeline_stage=1)
    spec = placed.sharding_spec.add(tensor_name='x')
    spec.device.extend([0, 1])
    spec.sharded_dim.add(axis=0).simple_sharding.add(dim_value=2, num_shards=2)


save('devices_are_carried', [h.make_node('Relu', ['x'], ['y'])], ir=11, edit=devices)
save('omitted_optional_inputs', [h.make_node('Clip', ['x', '', 'hi'], ['y'], name='c')],
     initializers=[h.make_tensor('hi', T.FLOAT, [], [1.0])])
save('omitted_outputs_and_bytes', [h.make_node('Odd', ['x'], ['y', '', 'z'], domain='my', raw=b'\xff\x00\xfe', many=[b'\xff', b'']),
                                   h.make_node('Top', ['x', ''], [''], domain='my', typed=h.make_tensor_type_proto(T.FLOAT, ['k']))],
     outputs=[y, value('z')])
tensor = h.make_tensor_type_proto(T.FLOAT, ['n', 4])
save('sequence_and_empty_tensors', [h.make_node('SequenceConstruct', ['x', 'x'], ['q'])],
     outputs=[h.make_value_info('q', h.make_sequence_type_proto(tensor))],
     initializers=[h.make_tensor('z', T.FLOAT, [0, 4], [])])
opaque = onnx.TypeProto(denotation='ODD')
opaque.opaque_type.domain, opaque.opaque_type.name = 'test', 'thing'
dims = h.make_tensor_type_proto(T.FLOAT, ['n', None, 3])
dims.tensor_type.shape.dim[0].denotation = 'DATA_BATCH'
save('types_of_every_kind', [h.make_node('Relu', ['x'], ['y'])], [
    x, h.make_value_info('option', h.make_optional_type_proto(tensor)),
    h.make_value_info('map', h.make_map_type_proto(T.STRING, h.make_tensor_type_proto(T.INT64, []))),
    h.make_value_info('sparse', h.make_sparse_tensor_type_proto(T.FLOAT, [3, 3])),
    h.make_value_info('deep', h.make_sequence_type_proto(h.make_sequence_type_proto(tensor))),
    h.make_value_info('opaque', opaque), h.make_value_info('dims', dims),
    h.make_value_info('unranked', h.make_tensor_type_proto(T.FLOAT, None)), onnx.ValueInfoProto(name='untyped')])
kinds = [T.FLOAT, T.UINT8, T.INT8, T.UINT16, T.INT16, T.INT32, T.INT64, T.BOOL, T.FLOAT16, T.DOUBLE, T.UINT32, T.UINT64,
         T.COMPLEX64, T.COMPLEX128, T.BFLOAT16, T.FLOAT8E4M3FN, T.FLOAT8E4M3FNUZ, T.FLOAT8E5M2, T.FLOAT8E5M2FNUZ]
names = {number: T.DataType.Name(number).lower() for number in kinds}
save('typed_data_fields', [h.make_node('Add', ['x', 'float'], ['y'])], opset=21, ir=10, initializers=[
    *(h.make_tensor(names[kind], kind, [4], [1, 2, 0, 1]) for kind in kinds),
    h.make_tensor('string', T.STRING, [2], [b'a', b'']), h.make_tensor('uint4', T.UINT4, [3], [1, 2, 3]),
    h.make_tensor('int4', T.INT4, [3], [1, -2, 3]), h.make_tensor('float4e2m1', T.FLOAT4E2M1, [3], [1, 2, 3])])
save('raw_data_of_every_type', [h.make_node('Add', ['x', 'float'], ['y'])], opset=21, ir=10, initializers=[
    T(name=names[kind], data_type=kind, dims=[4], raw_data=bytes(4 * h.tensor_dtype_to_np_dtype(kind).itemsize))
    for kind in kinds])
save('unsorted_nodes', [h.make_node('Relu', ['m'], ['y']), h.make_node('Neg', ['x'], ['m'])])


def defaults(model):
    node = model.graph.node[0]
    node.name, node.domain, node.doc_string = '', '', ''
    node.attribute.add(name='alpha', type=onnx.AttributeProto.FLOAT, f=0.0)
    model.graph.input[0].doc_string = ''
    model.doc_string, model.model_version, model.domain = '', 0, ''


save('defaults_are_written_out', [h.make_node('LeakyRelu', ['x'], ['y'])], edit=defaults)
save('nothing_but_an_input', [], outputs=[x])
