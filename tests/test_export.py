"supernet: students that are teachers again, teachers that stay on disk, and students where there is no slm_begin."
import json
import math
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import tiny_model
from test_families import FAMILIES, ids, logits, random_subnet, tiny

from slm_begin.importance import measure
from slm_begin.space import SearchSpace
from slm_begin.supernet import NotASupernet, Subnet, SubnetError, Supernet, config_sizes, load_model, save_student

every = pytest.mark.parametrize('family', FAMILIES)
# Renamed keys, groups, tied weights, transposed and fused matrices, learned positions
a_few = pytest.mark.parametrize('family', ['gpt_neox', 'llama', 'gemma2', 'gpt2', 'opt', 'phi3'])


def same(a, b):
    "Are all weights and buffers of two models the same, by the same names?"
    tensors = [dict([*m.named_parameters(remove_duplicate=False), *m.named_buffers()]) for m in (a, b)]
    return tensors[0].keys()==tensors[1].keys() and all(t.dtype==tensors[1][n].dtype and torch.equal(t, tensors[1][n]) for n, t in tensors[0].items())

def said(model):
    "What its config says of its shape."
    return getattr(model.config, 'subnet', None) or config_sizes(model.config)

def through(a, b):
    "The sub-network of the teacher that is sub-network `b` of its sub-network `a`."
    pick = lambda of, ids: tuple(of[i] for i in ids)
    inside = lambda axis: tuple(pick(getattr(a, axis)[l], ids) for l, ids in zip(b.layers, getattr(b, axis)))
    return Subnet(pick(a.layers, b.layers), pick(a.embd, b.embd), inside('heads'), inside('ffn'))

def random_of(net, rng):
    "As `random_subnet`, where each layer has sizes of its own."
    some = lambda n: rng.sample(range(n), rng.randint(1, n))
    layers = sorted(some(net.sizes['layers']))
    return net.subnet(layers, some(net.sizes['embd']), *(tuple(some(net.size(axis, l)) for l in layers) for axis in ('heads', 'ffn')))


# A student can be a teacher again

def cuts_like(student, net, a, cuts):
    "Is `student` the sub-network `a` of `net`, and does it give what `net` gives directly?"
    assert student.full.sizes=={**a.sizes, 'layers': [*range(len(a.layers))]}
    assert student.count(student.full)==net.count(a) and student.flops(student.full, 16)==net.flops(a, 16)
    for b in cuts:
        got, direct = student.extract(b), net.extract(through(a, b))
        assert student.count(b)==net.count(through(a, b))==student.init(b).num_parameters()
        assert same(got, direct) and said(got)==said(direct) and torch.equal(logits(got), logits(direct))

@every
def test_a_student_of_a_student_is_one_of_the_teacher(family, tmp_path):
    "Saved, and left on disk."
    net, rng = tiny(family), random.Random(5)
    a = random_subnet(net, rng)
    save_student(net.extract(a), tmp_path)
    student = Supernet.from_disk(tmp_path)
    cuts_like(student, net, a, [student.full, random_of(student, rng)])

@a_few
def test_grandchildren(family, tmp_path):
    "Through students in memory and loaded ones, with shapes that the family can say and others; the last one is saved too."
    net, rng = tiny(family), random.Random(6)
    for i, a in enumerate([random_subnet(net, rng), net.subnet(embd=net.sizes['embd'] // 2, heads=net.sizes['heads'] // 2, ffn=24)]):
        save_student(net.extract(a), tmp_path/f'{i}')
        for student in Supernet(net.extract(a)), Supernet(load_model(tmp_path/f'{i}')):
            e, h = student.sizes['embd'] // 2 or 1, min(map(len, student.full.heads))
            cuts_like(student, net, a, [random_of(student, rng), student.subnet(1), student.subnet(embd=e), student.subnet(1, embd=range(e), heads=h)])
        b = random_of(student, rng)
        save_student(student.extract(b), tmp_path/f'{i}{i}')
        last = Supernet(load_model(tmp_path/f'{i}{i}'))
        cuts_like(last, net, through(a, b), [last.full, random_of(last, rng)])

def test_layers_of_different_sizes_are_checked_one_by_one():
    net = tiny('llama')
    student = Supernet(net.extract(net.subnet([0, 2], 20, (1, 2), ([3, 1, 5], 12))))
    assert student.sizes==dict(layers=2, embd=20, heads=2, ffn=12, vocab=96) and student.full.sizes==dict(layers=[0, 1], embd=20, heads=[1, 2], ffn=[3, 12])
    assert student.subnet(heads=(1, 2), ffn=[[2, 0], [11]]).sizes['ffn']==[2, 1]
    with pytest.raises(SubnetError, match='`heads` of layer 0: cannot keep 2; the teacher has 1'): student.subnet(heads=2)
    with pytest.raises(SubnetError, match='`ffn` of layer 1.*12 is not there.*the teacher has 12'): student.subnet(ffn=(3, [12]))
    with pytest.raises(SubnetError, match='`ffn` of layer 0.*the teacher has 3'): student.count(Subnet((0,), (0,), ((0,),), ((0, 3),)))
    assert student.count(Subnet((1,), (0,), ((0,),), ((0, 3),))) > 0

def test_what_needs_layers_of_one_size_says_so():
    net = tiny('llama')
    student = Supernet(net.extract(net.subnet(heads=(1, 2, 2))))
    for use in lambda: SearchSpace(student, round_to=dict(embd=8, ffn=8)), lambda: measure(student, ids()):
        with pytest.raises(ValueError, match='layers of different sizes'): use()


# A teacher can stay on disk

def saved(net, folder, dtype=torch.float32, **kw):
    "A checkpoint as others write it: with transformers' own keys for the family, perhaps in several files."
    model = net.extract(net.full)
    model.generation_config.max_length = 77
    model.to(dtype).save_pretrained(folder, **kw)
    return folder

@a_few
@pytest.mark.parametrize('stored, dtype, shards', [
    (torch.float32, None, {}), (torch.bfloat16, torch.float32, {}),
    (torch.bfloat16, None, dict(max_shard_size='15KB')), (torch.float32, torch.bfloat16, dict(max_shard_size='15KB'))])
def test_a_teacher_on_disk_is_cut_as_in_memory(family, stored, dtype, shards, tmp_path):
    saved(tiny(family), tmp_path, stored, **shards)
    assert (len([*tmp_path.glob('*.safetensors')]) > 2)==bool(shards)
    disk, net, rng = Supernet.from_disk(tmp_path, dtype), Supernet(load_model(tmp_path, dtype or stored)), random.Random(7)
    assert {p.device.type for p in disk.model.parameters()}=={'meta'} and repr(disk).partition(': ')[2]==repr(net).partition(': ')[2].replace(family, '')
    for sub in net.full, random_subnet(net, rng), random_subnet(net, rng), net.subnet(2, heads=1):
        a, b = disk.extract(sub), net.extract(sub)
        assert same(a, b) and a.dtype==b.dtype==(dtype or stored) and disk.count(sub)==a.num_parameters()
        assert a.generation_config.to_dict()==b.generation_config.to_dict() and a.generation_config.max_length==77
        assert same(disk.init(sub, 3), net.init(sub, 3)) and not a.lm_head.weight.is_meta
        assert not {t.data_ptr() for t in a.parameters()} & {t.data_ptr() for t in disk.extract(sub).parameters()}


@pytest.mark.parametrize('family, keys', [
    ('gpt_neox', lambda t: {**t, 'gpt_neox.rotary_emb.inv_freq': torch.zeros(2), 'gpt_neox.layers.0.attention.masked_bias': torch.zeros(())}),  # Pythia's
    ('gpt2', lambda t: {k.removeprefix('transformer.'): v for k, v in t.items()}),          # as openai-community/gpt2
    ('llama', lambda t: {**t, 'model.layers.0.self_attn.rotary_emb.inv_freq': torch.zeros(4)})])
def test_keys_of_other_makers(family, keys, tmp_path):
    from safetensors.torch import load_file, save_file
    file = saved(tiny(family), tmp_path)/'model.safetensors'
    save_file(keys(load_file(file)), file, metadata=dict(format='pt'))
    net, disk = Supernet(load_model(tmp_path)), Supernet.from_disk(tmp_path)
    assert same(disk.extract(disk.full), net.extract(net.full)) and torch.equal(logits(disk.extract(disk.full)), logits(tiny(family).model))


def test_what_is_not_kept_is_not_read(tmp_path):
    "Files that hold dropped layers only may be gone; changing the student changes no file."
    saved(tiny('gpt_neox'), tmp_path, max_shard_size='6KB')
    disk, before = Supernet.from_disk(tmp_path), {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    where = json.loads((tmp_path/'model.safetensors.index.json').read_text())['weight_map']
    only_layer_1 = {file for file in where.values() if all('.layers.1.' in key for key, at in where.items() if at==file)}
    student = disk.extract(disk.full)
    for p in student.parameters(): p.data.zero_()
    assert only_layer_1 and {f.name: f.read_bytes() for f in tmp_path.iterdir()}==before
    for file in only_layer_1: (tmp_path/file).unlink()
    disk.extract(disk.subnet([0, 2]))
    with pytest.raises(ValueError, match='|'.join(only_layer_1)): disk.extract(disk.subnet([1]))


peak = '''
import sys
from slm_begin.supernet import Supernet, load_model
def memory(what): return 1024 * int(next(line.split()[1] for line in open('/proc/self/status') if line.startswith(what)))
def growth(make, disk):
    net = make(sys.argv[1]) if disk else None
    open('/proc/self/clear_refs', 'w').write('5')                       # forget the peak so far
    before = memory('VmRSS')
    net = net or make(sys.argv[1])
    model = net.extract(net.subnet([0, 3, 5], range(0, 512, 2), 2, range(1, 2048, 4)))
    return memory('VmHWM') - before, 4 * model.num_parameters()
disk = Supernet.from_disk(sys.argv[1])
disk.extract(disk.subnet(1, 16, 1, 16))                                 # whatever is loaded the first time
print(*growth(Supernet.from_disk, True), *growth(lambda folder: Supernet(load_model(folder)), False))
'''

@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason="the peak of a process' memory is read from /proc")
def test_memory_holds_the_student_and_one_parameter(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(vocab_size=4000, hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8, intermediate_size=2048)
    with torch.device('meta'): model = LlamaForCausalLM(config)
    model = model.to_empty(device='cpu')
    largest = 4 * max(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path)
    r = subprocess.run([sys.executable, '-c', peak, tmp_path], capture_output=True, text=True)
    assert not r.returncode, r.stderr
    from_disk, student, in_memory, _ = map(int, r.stdout.split())
    assert from_disk < student + 3 * largest < in_memory, f"{from_disk:,} bytes for a student of {student:,}, {in_memory:,} with the teacher in memory"


def spoil(folder, what):
    first = min(folder.glob('*.safetensors'))
    config, index = folder/'config.json', folder/'model.safetensors.index.json'
    if what=='no folder': shutil.rmtree(folder)
    if what=='no weights': [f.unlink() for f in [index, *folder.glob('*.safetensors')]]
    if what=='a file is missing': first.unlink()
    if what=='a file is cut off': first.write_bytes(first.read_bytes()[:-10])
    if what=='a file is no such file': first.write_bytes(b'not weights')
    if what=='no index': index.write_text('{"weight_map": 3}')
    if what=='no config': config.unlink()
    if what=='odd config': config.write_text(config.read_text().replace('"gpt_neox"', '"no_such"'))
    quantised = dict(quantization_config=dict(quant_method='bitsandbytes', load_in_8bit=True))
    if what=='quantised': config.write_text(json.dumps({**json.loads(config.read_text()), **quantised}))
    if what=='another width': config.write_text(config.read_text().replace('"intermediate_size": 40', '"intermediate_size": 48'))
    if what=='more layers': config.write_text(config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    return first

@pytest.mark.parametrize('what, why', [
    ('no folder', 'no such folder'), ('no weights', '/model.safetensors. cannot be read'), ('a file is missing', 'FIRST. cannot be read'),
    ('a file is cut off', 'FIRST. cannot be read'), ('a file is no such file', 'FIRST. cannot be read'),
    ('no index', 'index.json. does not say where the weights are'),
    ('no config', '/config.json. describes no model'), ('odd config', '/config.json. describes no model'), ('quantised', '/config.json.*quantised'),
    ('another width', r'dense_h_to_4h.weight. in .*/model-.*safetensors. has the shape .40, 32., but config.json says .48, 32.'),
    ('more layers', r'.gpt_neox.layers.3.*. is in none of the files of .*FIRST')])
def test_a_checkpoint_that_is_wrong_is_named(what, why, tmp_path):
    first = spoil(saved(tiny('gpt_neox'), tmp_path/'model', max_shard_size='15KB'), what)
    with pytest.raises((ValueError, FileNotFoundError), match=why.replace('FIRST', first.name)) as e: Supernet.from_disk(tmp_path/'model')
    assert (e.type is NotASupernet)==(what=='quantised')

def test_a_teacher_on_disk_cannot_be_run(tmp_path):
    disk = Supernet.from_disk(saved(tiny('llama'), tmp_path))
    for run in lambda: disk.model(ids()), lambda: disk.model.generate(ids(), max_new_tokens=2):
        with pytest.raises(ValueError, match='stay on disk, so it cannot be run: load it with `Supernet.from_pretrained`'): run()
    with pytest.raises(ValueError, match='has no weights in memory: load them to measure it'): measure(disk, ids())


# Students where there is no slm_begin

elsewhere = '''
import pathlib, sys, torch
sys.modules['slm_begin'] = None                                         # whoever imports it fails
from transformers import AutoModelForCausalLM
close = lambda a, b, **kw: torch.testing.assert_close(a, b, **{**dict(rtol=1e-4, atol=1e-5), **kw})
def load(folder, **kw): return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code='layerwise' in folder.name, **kw).eval()
def write(model, x, **kw): return model.generate(x, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None, **kw)

def as_it_was(model, want, folder):
    close(model(input_ids=want['ids'], use_cache=False).logits, want['logits'])

def generate(model, want, folder):
    for cache in True, False: assert torch.equal(write(model, want['ids'], use_cache=cache), want['text'])
    first = model(input_ids=want['ids'][:, :6], use_cache=True)
    close(model(input_ids=want['ids'][:, 6:], past_key_values=first.past_key_values, use_cache=True).logits, want['logits'][:, 6:])
    wide = model.generate(want['ids'], max_new_tokens=4, num_beams=3, do_sample=False, pad_token_id=0, eos_token_id=None)      # reorders the cache
    assert wide.shape==(2, want['ids'].shape[1] + 4)

def batches_with_padding_on_the_left(model, want, folder):
    rows = want['ids'][0], want['ids'][1, :7]
    padded = torch.stack([rows[0], torch.cat([rows[1].new_zeros(4), rows[1]])])
    mask = torch.tensor([[1] * 11, [0] * 4 + [1] * 7])
    together = write(model, padded, attention_mask=mask)
    for i, row in enumerate(rows): assert torch.equal(together[i, 11:], write(model, row[None])[0, len(row):])
    one_by_one = model(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0)).logits
    close(one_by_one[1, 4:], model(input_ids=rows[1][None]).logits[0])

def compiled(model, want, folder):
    if not folder.name.startswith(('gpt_neox', 'llama')): return        # some seconds each
    torch._dynamo.reset()
    close(torch.compile(model, backend='eager')(input_ids=want['ids'], use_cache=False).logits, want['logits'], rtol=1e-3, atol=1e-4)

def half_precision(model, want, folder):
    half = load(folder, dtype=torch.bfloat16)
    out = half(input_ids=want['ids']).logits
    assert half.dtype==out.dtype==torch.bfloat16 and {p.dtype for p in half.parameters()}=={torch.bfloat16}
    assert (out.float() - want['logits']).abs().mean() < .1 * want['logits'].abs().mean()

def checkpointing(model, want, folder):
    def learn():
        model.zero_grad(), torch.manual_seed(0)                         # the same dropout
        loss = model(input_ids=want['ids'], labels=want['ids']).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}
    calls = []
    model.train()
    inside = [m for layers in model.modules() if isinstance(layers, torch.nn.ModuleList) for layer in layers for m in layer.children()]
    handles = [m.register_forward_pre_hook(lambda m, a: calls.append(m)) for m in inside]
    (loss, grads), once = learn(), len(calls)
    model.gradient_checkpointing_enable()
    (again, others), twice = learn(), len(calls) - once
    model.gradient_checkpointing_disable()
    for h in handles: h.remove()
    assert once and twice > 1.5 * once, (once, twice)                   # the layers really ran once more
    close(again, loss)
    for name, g in grads.items(): close(others[name], g, msg=name)
    model.eval()

def saved_again(model, want, folder):
    model.save_pretrained(folder/'again')
    again = (folder/'again').rename(folder/f'{folder.name}-again')
    assert (again/'modeling_subnet.py').exists()==('layerwise' in folder.name)
    close(load(again)(input_ids=want['ids'], use_cache=False).logits, want['logits'])

def attention_of_each_kind(model, want, folder):
    for kind in ['eager'] + ['sdpa'] * model._supports_sdpa:
        close(load(folder, attn_implementation=kind)(input_ids=want['ids'], use_cache=False).logits, want['logits'])

checks = as_it_was, generate, batches_with_padding_on_the_left, compiled, half_precision, checkpointing, saved_again, attention_of_each_kind
torch.set_num_threads(1)
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    want, model = torch.load(folder/'expected.pt', weights_only=True), load(folder)
    for check in checks:
        try: check(model, want, folder)
        except Exception as e: print(f'{folder.name}: {check.__name__}: {type(e).__name__}: {str(e)[:1000]}')
    print(folder.name, type(model).__name__, 'done')
'''

@pytest.mark.slow
def test_students_work_where_there_is_no_slm_begin(tmp_path):
    for family in 'gpt_neox', 'llama', 'gemma2', 'gpt2', 'qwen3', 'phi3', 'opt':
        net = tiny(family)
        for kind, sub in dict(plain=net.subnet([0, 2], heads=net.sizes['heads'], ffn=24), layerwise=net.subnet([0, 2], 20, (1, 2), (20, 12))).items():
            model, x = net.extract(sub).eval(), ids()
            save_student(model, tmp_path/f'{family}-{kind}')
            text = model.generate(x, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
            torch.save(dict(ids=x, logits=logits(model), text=text), tmp_path/f'{family}-{kind}'/'expected.pt')
    r = subprocess.run([sys.executable, '-c', elsewhere, tmp_path], capture_output=True, text=True, cwd=tmp_path)
    assert not r.returncode, r.stderr[-3000:]
    lines = r.stdout.splitlines()
    assert [line for line in lines if not line.endswith('done')]==[] and len(lines)==14 and r.stdout.count('SubnetForCausalLM')==7, r.stdout


# In lm-eval, as it is

task = '''
task: two_texts
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
metadata: {version: 1}
'''

@pytest.mark.slow
def test_lm_eval_reads_students_without_an_adapter(tmp_path, tok, monkeypatch):
    lm_eval = pytest.importorskip('lm_eval', reason="needs the extra `eval`: pip install -e '.[eval]'")
    from lm_eval.tasks import TaskManager
    texts = ['The old man looked at the sea, and the sea looked back.', 'Nobody had told her that it would rain for so long.']
    (tmp_path/'texts.jsonl').write_text(''.join(json.dumps(dict(text=t)) + '\n' for t in texts))
    (tmp_path/'two_texts.yaml').write_text(task.replace('FILE', str(tmp_path/'texts.jsonl')))
    monkeypatch.setattr('datasets.config.HF_DATASETS_CACHE', tmp_path/'cache')
    net = Supernet(tiny_model(vocab_size=len(tok), max_position_embeddings=128))
    for kind, sub in dict(plain=net.subnet(2, 16, 2, 24), layerwise=net.subnet([0, 2], 20, (1, 2), (20, 12))).items():
        model = net.extract(sub).eval()
        save_student(model, tmp_path/kind, tok)
        args = dict(pretrained=str(tmp_path/kind), dtype='float32', trust_remote_code=kind=='layerwise')
        got = lm_eval.simple_evaluate('hf', args, tasks=['two_texts'], task_manager=TaskManager(include_path=str(tmp_path)), device='cpu', batch_size=1)
        nats = 0
        for text in texts:
            row = torch.tensor([[tok.eos_token_id, *tok(text).input_ids]])
            with torch.no_grad(): nats += model(input_ids=row, labels=row).loss.item() * (row.shape[1] - 1)
        want = nats / math.log(2) / sum(len(t.encode()) for t in texts)
        assert got['results']['two_texts']['bits_per_byte,none']==pytest.approx(want, rel=1e-4)
