"supernet: the laws of DESIGN.md section 4 for every architecture that is inferred, on tiny models with random weights."
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from slm_begin import supernet
from slm_begin.distill import CrossEntropy, Distill
from slm_begin.supernet import NotASupernet, Subnet, SubnetError, Supernet, axis_in, config_name, entries, infer_axes, load_model, resized, save_student

root = Path(__file__).parent.parent
sys.path.insert(0, str(root/'tools'))
import record  # noqa: E402

# Grouped and single queries, tied and free embeddings, biases or none, extra norms, soft caps, sliding windows, scaled embeddings,
# fused matrices, learned positions
FAMILIES = '''apertus arcee biogpt bitnet cohere cohere2 ernie4_5 exaone4 gemma gemma2 gemma3_text glm glm4 gpt2 gpt_neox granite helium hunyuan_v1_dense
    hyperclovax internlm3 jais2 llama ministral ministral3 mistral nanochat nemotron olmo olmo2 olmo3 opt phi phi3 qwen2 qwen3 seed_oss smollm3 stablelm
    starcoder2 vaultgemma'''.split()
every = pytest.mark.parametrize('family', FAMILIES)


def tiny(family, seed=0, **settings):
    "A model of three layers with weights that are trivial nowhere."
    config = CONFIG_MAPPING[family](**settings)
    for k in 'pad_token_id', 'bos_token_id', 'eos_token_id':
        if getattr(config, k, None) is not None: setattr(config, k, 0)
    for k in 'attention_bias', 'mlp_bias':
        if hasattr(config, k) and isinstance(getattr(config, k), bool): setattr(config, k, True)
    grouped = config_name(config, 'heads') is not None and getattr(config, config_name(config, 'heads')) is not None
    config = resized(config, [0, 1, 2], vocab=96, embd=32, queries=4, heads=2 if grouped else 4, head_size=8, ffn=40)
    if hasattr(config, 'word_embed_proj_dim'): config.word_embed_proj_dim = 32
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters(): p.data += .1 * torch.randn_like(p)
    return Supernet(model, family)

def some(rng, n): return rng.sample(range(n), rng.randint(1, n))

def random_subnet(net, rng, width=True):
    s, layers = net.sizes, sorted(some(rng, net.sizes['layers']))
    return net.subnet(layers, some(rng, s['embd']) if width else None, tuple(some(rng, s['heads']) for _ in layers), tuple(some(rng, s['ffn']) for _ in layers))

def inside(net, rng, sub):
    "The same with random query heads of the kept heads, in any order, and random pairs and other entries of each head."
    r, rotary, shuffled = net.units['queries'], net.rotary, lambda v: rng.sample(v, len(v))
    numbers = [rng.randint(1, r) for _ in sub.layers]
    queries = tuple([h * r + i for h in heads for i in rng.sample(range(r), n)] for heads, n in zip(sub.heads, numbers))
    pairs, others = some(rng, rotary.width // 2) if rotary.width else [], range(rotary.width, net.head_size)
    kept = [i for i in range(rotary.width) if rotary.pair(i) in pairs] + rng.sample(others, rng.randint(not pairs, len(others)))
    return net.subnet(sub.layers, sub.embd, sub.heads, sub.ffn, queries, shuffled(kept))

def ids(seed=0): return torch.randint(1, 96, (2, 11), generator=torch.Generator().manual_seed(seed))

@torch.no_grad()
def logits(model, x=None): return model.eval()(input_ids=ids() if x is None else x, use_cache=False).logits


@every
def test_the_full_subnet_is_the_teacher(family):
    net = tiny(family)
    assert torch.equal(logits(net.extract(net.full)), logits(net.model))

@every
def test_a_count_is_the_truth(family):
    net, rng = tiny(family), random.Random(0)
    for _ in range(8):
        outer = random_subnet(net, rng)
        for sub in outer, inside(net, rng, outer):
            model = net.extract(sub)
            assert net.count(sub)==sum(p.numel() for p in model.parameters())==sum(p.numel() for p in net.init(sub).parameters())
            cache = model(input_ids=ids(), use_cache=True).past_key_values
            assert net.cost(sub, 'kv_bytes', dtype=torch.float32)==4 * sum(l.keys.numel() + l.values.numel() for l in cache.layers) / ids().numel()

@every
def test_order_does_not_matter(family):
    net, rng = tiny(family), random.Random(1)
    want, s = logits(net.model), net.sizes
    shuffled = lambda n: rng.sample(range(n), n)
    for kw in dict(embd=shuffled(s['embd'])), dict(heads=tuple(shuffled(s['heads']) for _ in range(3))), dict(ffn=tuple(shuffled(s['ffn']) for _ in range(3))):
        torch.testing.assert_close(logits(net.extract(net.subnet(**kw))), want, rtol=1e-3, atol=1e-3)
    r, heads = net.units['queries'], shuffled(s['heads'])
    queries = tuple(h * r + i for h in heads for i in shuffled(r))
    mixed = replace(net.full, heads=(tuple(heads),) * 3, queries=(queries,) * 3, head_size=net.rotary.arranged(range(net.head_size)[::-1])[1])
    torch.testing.assert_close(logits(net.extract(mixed)), want, rtol=1e-3, atol=1e-3)

COUNTS_WHAT_IS_THERE = 'bitnet', 'olmo2', 'olmo3'          # a norm over all heads or neurons together: fewer of them are not the same as zeros

@pytest.mark.parametrize('family', [f for f in FAMILIES if f not in COUNTS_WHAT_IS_THERE])
def test_dropping_is_zeroing(family):
    "Of heads, neurons and layers: the teacher with zeros in the matrices that would read them, and in all that a dropped layer adds."
    net, rng = tiny(family), random.Random(2)
    for _ in range(3):
        sub = random_subnet(net, rng, width=False)
        whole = Supernet(net.extract(net.full), family)
        for name, p in whole.model.named_parameters():
            dims, layer = whole.axes_of(name)
            if layer is None or len(dims) < 2: continue
            dim = reads(whole, name)
            axis = axis_in(dims[dim])
            if axis not in ('heads', 'ffn'): continue
            kept = getattr(sub, axis)[sub.layers.index(layer)] if layer in sub.layers else ()
            gone = [i for i in range(net.sizes[axis]) if i not in kept]
            if gone: p.data.index_fill_(dim, entries(dims[dim], gone, net.sizes[axis], net.units), 0)
        for i in set(range(net.sizes['layers'])) - set(sub.layers): silence(whole.model.get_submodule(net.layers_at)[i])
        torch.testing.assert_close(logits(net.extract(sub)), logits(whole.model), rtol=1e-3, atol=1e-3)

NORMS_HEADS = *COUNTS_WHAT_IS_THERE, 'apertus', 'exaone4', 'gemma3_text', 'hunyuan_v1_dense', 'nanochat', 'qwen3'     # a norm over the entries of each head

@pytest.mark.parametrize('family', [f for f in FAMILIES if f not in NORMS_HEADS])
def test_dropping_is_zeroing_inside_heads(family):
    "Of query heads and of the entries of each head: zeros in what the queries are and in what the output projection reads."
    net, rng = tiny(family), random.Random(6)
    for _ in range(3):
        sub = inside(net, rng, net.full)
        whole = Supernet(net.extract(net.full), family)
        gone, r = [i for i in range(net.head_size) if i not in (sub.head_size or range(net.head_size))], net.units['queries']
        for name, p in whole.model.named_parameters():
            dims, layer = whole.axes_of(name)
            for dim, what in enumerate(dims):
                if axis_in(what)!='heads': continue
                at = entries(what, None, net.sizes['heads'], net.units, head_size=gone) if gone else torch.zeros(0, dtype=torch.int64)
                if sub.queries and len(dims)==2 and dim==reads(whole, name):                 # the output projection
                    out = sorted(set(range(net.sizes['heads'] * r)) - set(sub.queries[layer]))
                    at = torch.cat([at, *(torch.arange(q * net.head_size, (q + 1) * net.head_size) for q in out)])
                p.data.index_fill_(dim, at, 0)
        torch.testing.assert_close(logits(net.extract(sub)), logits(whole.model), rtol=1e-3, atol=1e-3)

def silence(layer):
    "Nothing that a layer adds is left, whatever it does to what it has read: it gives back what came in."
    forward = layer.forward
    def passes(hidden_states, *args, **kwargs):
        out = forward(hidden_states, *args, **kwargs)
        return (hidden_states, *out[1:]) if isinstance(out, tuple) else hidden_states
    layer.forward = passes

def reads(net, name):
    "The dimension of a matrix that holds its inputs."
    return 0 if type(net.model.get_submodule(name.rpartition('.')[0])).__name__=='Conv1D' else 1

@every
def test_what_is_saved_is_what_was(family, tmp_path):
    net, rng = tiny(family), random.Random(3)
    uniform = net.subnet([0, 2], net.sizes['embd'] // 2, net.sizes['heads'] // 2, 24)
    for name, sub in dict(uniform=uniform, layerwise=(layerwise := random_subnet(net, rng)), heads=net.subnet(2, heads=1),
                          queries=net.subnet(2, queries=1), inside=inside(net, rng, layerwise)).items():
        model = net.extract(sub).eval()
        save_student(model, tmp_path/name)
        again = load_model(tmp_path/name)
        assert torch.equal(logits(again), logits(model)), name
        writes = lambda m, cache: m.generate(ids(), max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0, eos_token_id=None)
        assert torch.equal(writes(again, True), writes(model, True)) and torch.equal(writes(again, True), writes(again, False)), name
        assert hasattr(again.config, 'subnet')==(not net.expressible(sub))

@every
def test_students_learn_and_start_at_random(family):
    net, rng = tiny(family), random.Random(4)
    sub = random_subnet(net, rng)
    for model in net.extract(sub), net.extract(inside(net, rng, sub)), net.init(inside(net, rng, sub)), net.init(net.full):
        model.train()(input_ids=ids(), labels=ids()).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every
def test_the_chunked_loss_is_the_models_own(family):
    "Also with biases, factors and soft caps behind the output projection."
    net = tiny(family)
    model, batch = net.extract(net.subnet([0, 2], 20, 2, 24)).eval(), ids()
    loss, _ = CrossEntropy(chunk=7)(model, batch)
    want = model(input_ids=batch, labels=batch).loss
    assert abs(loss - want) < 1e-4
    params = [*model.parameters()]
    for a, b in zip(*(torch.autograd.grad(o, params, allow_unused=True) for o in (loss, want)), strict=True):
        assert (a is None)==(b is None)
        if a is not None: torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert abs(Distill(net.model, 0, 1)(net.extract(net.full).eval(), batch)[0]) < 1e-4    # nothing to learn from oneself

def test_a_teacher_without_weights_is_enough_to_count():
    config = tiny('gemma2').config
    config.head_dim = 10                                                # an architecture that was not asked about yet
    with torch.device('meta'):
        net = Supernet(AutoModelForCausalLM.from_config(config))
        assert net.count(net.full)==net.model.num_parameters() and not net.native(16, 2)

def test_attention_is_set_in_every_layer():
    model = tiny('qwen3').extract(tiny('qwen3').subnet([0, 2], 20, (1, 2), (20, 12))).eval()
    want = logits(model)
    model.set_attn_implementation('eager')
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, 'config')}=={'eager'}
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)

def test_logits_that_are_made_otherwise_are_refused():
    model = tiny('llama').extract(tiny('llama').full)
    model.lm_head.register_forward_hook(lambda module, args, out: out.flip(-1))
    with pytest.raises(ValueError, match='not made of its last hidden states in a way that is known'): CrossEntropy()(model, ids())


@pytest.mark.parametrize('rope', [dict(rope_type='linear', factor=4.), dict(rope_type='yarn', factor=4., original_max_position_embeddings=64),
                                  dict(rope_type='longrope', short_factor=[1.] * 4, long_factor=[2.] * 4, original_max_position_embeddings=64)])
def test_stretched_positions_stay(rope):
    net = tiny('llama', rope_parameters=dict(rope_theta=1e4, **rope))
    small = net.extract(net.subnet([0, 2], 20, (1, 2), (20, 12)))
    assert torch.equal(small.model.rotary_emb.inv_freq, net.model.model.rotary_emb.inv_freq)
    assert torch.equal(logits(net.extract(net.full)), logits(net.model))
    sub, whole = net.subnet(head_size=4), Supernet(net.extract(net.full))            # smaller heads are turned by the angles of the pairs that stay
    for name, p in whole.model.named_parameters():
        for dim, what in enumerate(whole.axes_of(name)[0]):
            gone = [i for i in range(8) if i not in sub.head_size]
            if axis_in(what)=='heads': p.data.index_fill_(dim, entries(what, None, 2, net.units, head_size=gone), 0)
    torch.testing.assert_close(logits(net.extract(sub)), logits(whole.model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('what, why', [
    (dict(queries=3), 'each head has 2'), (dict(queries=0), 'each head has 2'), (dict(queries=True), 'is no list'), (dict(queries=[0, 1]), 'each head has 2'),
    (dict(heads=[1, 0], queries=([0, 2],) * 3), 'in that order'), (dict(heads=[1, 0], queries=([2, 3],) * 3), 'in that order'),
    (dict(heads=[1, 0], queries=([3, 1],) * 2), '2 layers, but 3 are kept'), (dict(queries=([0, 1, 2],) * 3), 'as many for each'),
    (dict(head_size=3), 'no whole pairs'), (dict(head_size=0), 'no whole pairs'), (dict(head_size=9), 'no whole pairs'), (dict(head_size=[0, 1]), 'partner'),
    (dict(head_size=[0, 4, 8]), '8 is not there'), (dict(head_size=[0, 0]), 'twice'), (dict(head_size=[]), 'nothing'), (dict(head_size='4'), 'is no list')])
def test_what_is_wrong_inside_heads(what, why):
    with pytest.raises(SubnetError, match=why): tiny('llama').subnet(**what)

def test_subnets_that_do_not_fit_inside_heads():
    net = tiny('llama')
    for wrong in dict(queries=((0, 2), (0, 1), (0, 2))), dict(head_size=(0, 1)), dict(head_size=(4, 0)):
        sub = replace(net.full, **wrong)
        for f in net.count, net.extract, net.init, net.expressible:
            with pytest.raises(SubnetError): f(sub)
    sub = net.subnet(queries=1, head_size=4)
    assert Subnet.from_json(sub.to_json())==sub and net.subnet(queries=2, head_size=8)==net.full

def test_a_student_cut_inside_its_heads_is_no_teacher():
    net = tiny('llama')
    for sub in net.subnet(head_size=4), net.subnet(heads=(1, 2, 2), queries=1):
        with pytest.raises(SubnetError, match='cannot|not be cut again'): Supernet(net.extract(sub))
    assert Supernet(net.extract(net.subnet(queries=1))).units['queries']==1         # this one the family can say


# What cannot be cut is refused, with the reason

@pytest.mark.parametrize('family, why', [
    ('mixtral', 'mixture of experts'), ('bart', 'has an encoder'), ('mamba', 'has no `num_attention_heads`'), ('electra', 'no decoder'),
    ('bloom', 'follows embd in no way that is known'), ('xglm', 'not alike'), ('gemma3', 'more than text')])
def test_refused(family, why):
    with pytest.raises(NotASupernet, match=why): infer_axes(CONFIG_MAPPING[family]())


# The table of all families that the docs show, and how to add one

def test_the_table_in_the_docs_is_what_transformers_gives():
    "Of another version than the one that was asked: what passed still passes, or is gone."
    table = json.loads((root/'nbs'/'results'/'families.json').read_text(encoding='utf-8'))
    same = transformers.__version__==table['transformers']
    if same: assert table['families'].keys()==MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    for family, said in table['families'].items():
        if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or not same and 'reason' in said: continue
        if family=='phi4_multimodal': continue                          # it makes a large audio encoder: half a minute
        got = record.ask(family)
        assert short(got)==short(said) if same else 'parameters' in got, f'{family}: run `python tools/record.py families`'

def short(said): return {**said, 'reason': said['reason'].partition(':')[0]} if 'reason' in said else said      # behind it are words of torch

def test_a_line_teaches_a_name_and_a_layout(monkeypatch):
    "And a refusal says what was tried, and where that is explained."
    config = tiny('gpt_neox').config
    monkeypatch.setitem(supernet.CONFIG_NAMES, 'ffn', ['no_such_size'])
    with pytest.raises(NotASupernet, match='no parameter follows its `ffn`.*new_family'): infer_axes(named(config, 1))
    monkeypatch.undo()
    monkeypatch.setitem(supernet.LAYOUTS, 'multi-head', ['heads size', '3 heads size'])
    with pytest.raises(NotASupernet, match='query_key_value.weight` as 3 heads size') as e: infer_axes(named(config, 2))
    assert str(e.value).endswith(supernet.TEACH)
    supernet.LAYOUTS['multi-head'].append('heads 3 size')
    assert infer_axes(named(config, 3)).dims['gpt_neox.layers.*.attention.query_key_value.weight']==('heads 3 size', 'embd')

def named(config, n):
    "The config of an architecture that was not asked about yet."
    config.asked = n
    return config


def test_heads_whose_entries_are_not_paired_in_a_known_way_keep_their_size(monkeypatch):
    net = tiny('llama')
    monkeypatch.setattr(supernet, '_rotaries', {})
    monkeypatch.setattr(supernet, 'PAIRINGS', {'neighbours': supernet.PAIRINGS['neighbours']})     # as if Llama's halves were unknown
    assert net.rotary is None and set(supernet._rotaries.values())=={None}
    with pytest.raises(SubnetError, match='how `llama` pairs the entries of its heads is not known'): net.subnet(head_size=4)
    assert net.subnet(head_size=8)==net.full
