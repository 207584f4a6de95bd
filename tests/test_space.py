"space: bins at the extremes, teachers with almost nothing to choose from, and that no move ever leaves the bin or the space."
import random
import re
from itertools import product

import pytest
import torch
from conftest import tiny_model

from slm_begin.importance import orders
from slm_begin.space import GRANULARITIES, Bin, ParamBin, SearchSpace
from slm_begin.supernet import MEASURES, Subnet, Supernet

every = pytest.mark.parametrize('granularity', GRANULARITIES)
steps = dict(embd=8, ffn=8)


@pytest.fixture(scope='module')
def net(): return Supernet(tiny_model())

@pytest.fixture(scope='module')
def deep(): return Supernet(tiny_model(num_hidden_layers=12, num_attention_heads=16, hidden_size=32))


def moves(space, bin, rng, n=60):
    "Sub-networks from all moves in turn."
    pool = [space.sample(rng, bin) for _ in range(6)]
    yield from pool
    for _ in range(n):
        a, b = rng.choice(pool), rng.choice(pool)
        new = rng.choice([space.mutate(rng, a, bin), space.crossover(rng, a, b, bin), space.sample(rng, bin)])
        pool[rng.randrange(len(pool))] = new
        yield new


def extremes(space):
    "Fewest and most parameters of a space."
    def count(at):
        n, e, heads, ffn = (sizes[at] for sizes in space.ranges.values())
        return space.supernet.count_sizes(n, e, n * heads, n * ffn)
    return count(0), count(-1)


@every
@pytest.mark.parametrize('order', ['identity', 'random'])
def test_nothing_leaves_the_bin_or_the_space(net, granularity, order):
    rng = random.Random(0)
    space = SearchSpace(net, granularity, orders(order, net, seed=1), steps)
    full = net.count(net.full)
    for fraction,tolerance in [(.3, .3), (.5, .1), (.7, .05), (.9, .1)]:
        bin = ParamBin.around(full, fraction, tolerance)
        for sub in [*moves(space, bin, rng), space.one_shot(bin)]:
            assert net.count(sub) in bin and sub in space
            assert sub.uniform or granularity.endswith('layerwise')
            assert list(sub.layers)==sorted(set(sub.layers)) and all(h and f for h,f in zip(sub.heads, sub.ffn, strict=True))


@every
@pytest.mark.parametrize('end', [0, 1])
def test_bins_at_the_extremes(deep, granularity, end):
    "Only one shape fits: found at once, though a blind draw of heads would need 16**12 tries."
    space = SearchSpace(deep, granularity, round_to=steps)
    at, rng = extremes(space)[end], random.Random(0)
    bin = ParamBin(at, at)
    for sub in moves(space, bin, rng, 6): assert deep.count(sub)==at and sub in space
    assert space.shapes(bin)==[(1, 8), (12, 32)][end:end+1]
    if end: assert space.sample(rng, bin)==deep.full==space.one_shot(bin)


@every
def test_beyond_the_extremes(deep, granularity):
    space = SearchSpace(deep, granularity, round_to=steps)
    low, high = extremes(space)
    for bin in ParamBin(1, low - 1), ParamBin(high + 1, 10**12):
        for move in space.shapes, space.one_shot, lambda b: space.sample(random.Random(0), b):
            with pytest.raises(ValueError, match=f'The nearest has (?:{low:,}|{high:,}): .*Reachable are {low:,} to {high:,}$'): move(bin)


def test_between_two_steps(net):
    "Inside the reachable range, but between two counts: the message says what would help."
    space = SearchSpace(net, 'coarse-uniform', round_to=dict(embd=32, ffn=48))
    counts = sorted({net.count(s) for s in moves(space, ParamBin(1, 10**9), random.Random(0), 300)})
    gap = max(zip(counts, counts[1:], strict=False), key=lambda p: p[1] - p[0])
    with pytest.raises(ValueError, match=r"in steps: widen the bin's tolerance or make `round_to` smaller"): space.shapes(ParamBin(gap[0] + 1, gap[0] + 2))


def test_mixed_heads_reach_what_equal_heads_cannot(net):
    "Layer-wise, a bin that holds a single count, which needs layers with different numbers of heads."
    space = SearchSpace(net, round_to=dict(embd=32, ffn=48))
    sub = net.subnet(3, None, (1, 2, 1), None)
    bin = ParamBin(net.count(sub), net.count(sub))
    for s in moves(space, bin, random.Random(0), 20): assert net.count(s)==net.count(sub) and sum(map(len, s.heads))==4
    with pytest.raises(ValueError, match='no sub-network'): SearchSpace(net, 'coarse-uniform', round_to=dict(embd=32, ffn=48)).shapes(bin)


@every
@pytest.mark.parametrize('kw', [dict(num_hidden_layers=1, num_attention_heads=1, hidden_size=16, intermediate_size=32), dict(num_hidden_layers=1),
                                dict(num_attention_heads=1), dict(num_hidden_layers=2, tie=True, intermediate_size=33)])
def test_tiny_teachers(granularity, kw):
    net, rng = Supernet(tiny_model(**kw)), random.Random(0)
    space = SearchSpace(net, granularity, round_to=steps)
    full = net.count(net.full)
    for fraction in .5, .8, 1.:
        bin = ParamBin.around(full, fraction, .2)
        for sub in [*moves(space, bin, rng, 30), space.one_shot(bin)]: assert net.count(sub) in bin and sub in space


@every
def test_steps_as_wide_as_the_teacher(net, granularity):
    "Width and MLP have one choice each; layers and heads remain."
    space, rng = SearchSpace(net, granularity, round_to=dict(embd=32, ffn=48)), random.Random(0)
    seen = {*moves(space, ParamBin(1, 10**9), rng, 200)}
    assert {len(s.embd) for s in seen}=={32} and {len(f) for s in seen for f in s.ffn}=={48}
    assert {len(s.layers) for s in seen}=={1, 2, 3} and {len(h) for s in seen for h in s.heads}=={1, 2, 3, 4}


@every
def test_a_single_subnet(granularity):
    "There is nothing to change: moves give the only one, and end."
    net = Supernet(tiny_model(num_hidden_layers=1, num_attention_heads=1, hidden_size=16, intermediate_size=32))
    space, rng = SearchSpace(net, granularity, round_to=dict(embd=16, ffn=32)), random.Random(0)
    bin = ParamBin(1, 10**9)
    assert {*moves(space, bin, rng, 5)}=={net.full}=={space.one_shot(bin)}


@pytest.mark.parametrize('granularity', [g for g in GRANULARITIES if g.startswith('coarse')])
def test_everything_is_reachable(granularity):
    "A space small enough to list: sampling finds all of it, mutation alone too."
    net, rng = Supernet(tiny_model(num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=16)), random.Random(0)
    space, bin = SearchSpace(net, granularity, round_to=steps), ParamBin(1, 10**9)
    whole = set()
    for layers in (0,), (1,), (0, 1):
        n = len(layers)
        for e,heads,ffn in product((8, 16), product((1, 2), repeat=n), product((8, 16), repeat=n)):
            if granularity.endswith('layerwise') or len({*heads})==len({*ffn})==1: whole.add(space.build(layers, e, heads, ffn))
    assert {space.sample(rng, bin) for _ in range(1500)}==whole
    at, walked = net.full, set()
    for _ in range(3000): walked.add(at := space.mutate(rng, at, bin))
    assert walked==whole


@every
def test_moves_can_be_replayed(net, granularity):
    space = lambda: SearchSpace(net, granularity, orders('random', net, seed=3), steps)
    bin = ParamBin.around(net.count(net.full), .5, .1)
    assert [*moves(space(), bin, random.Random(7), 30)]==[*moves(space(), bin, random.Random(7), 30)]!=[*moves(space(), bin, random.Random(8), 30)]


def test_a_width_is_the_first_entries_of_its_order(net):
    o = orders('random', net, seed=5)
    space, rng = SearchSpace(net, orders_=o, round_to=steps), random.Random(0)
    for sub in moves(space, ParamBin(1, 10**9), rng):
        assert set(sub.embd)=={*o.embd[:len(sub.embd)]}
        for l,h,f in zip(sub.layers, sub.heads, sub.ffn, strict=True): assert {*h}=={*o.heads[l][:len(h)]} and {*f}=={*o.ffn[l][:len(f)]}
    shot = space.one_shot(ParamBin.around(net.count(net.full), .6, .1))
    assert {*shot.layers}=={*o.layers[:len(shot.layers)]}
    other = SearchSpace(net, round_to=steps)
    assert sum(s in other for s in moves(space, ParamBin(1, 10**9), rng)) < 10


@pytest.mark.parametrize('make,message', [
    (lambda net: SearchSpace(net, 'fine'), "`granularity` is 'fine'; choose one of coarse-uniform"),
    (lambda net: SearchSpace(net, round_to=dict(embd=64)), 'embd=64; give multiples from 1 to the teacher.s size .32.'),
    (lambda net: SearchSpace(net, round_to=dict(ffn=0)), 'ffn=0'),
    (lambda net: SearchSpace(net, round_to=dict(width=2)), '`round_to` has width; give embd, heads, ffn'),
    (lambda net: ParamBin(0, 5), '0 < low <= high'), (lambda net: ParamBin(7, 5), 'low=7, high=5'),
    (lambda net: ParamBin.around(100, 0), '`fraction` is 0'), (lambda net: ParamBin.around(100, .5, 1), '`tolerance` is 1'),
    (lambda net: ParamBin.around(100, .5, -.1), '`tolerance` is -0.1')])
def test_impossible_settings(net, make, message):
    with pytest.raises(ValueError, match=message): make(net)


# Fine spaces: any n entries

def test_early_entries_are_kept_more_often(net):
    order = orders('random', net, seed=2)
    space, rng, bin = SearchSpace(net, 'fine-layerwise', order, steps), random.Random(0), ParamBin.around(net.count(net.full), .6, .2)
    seen = [i for _ in range(300) for i in space.sample(rng, bin).embd]
    early, late = (sum(i in half for i in seen) for half in (set(order.embd[:16]), set(order.embd[16:])))
    assert early > 1.15 * late > 0

def test_a_child_keeps_what_both_parents_keep(net):
    space, rng, bin = SearchSpace(net, 'fine-layerwise', round_to=steps), random.Random(0), ParamBin.around(net.count(net.full), .6, .2)
    mixed = 0
    for _ in range(100):
        a, b = space.sample(rng, bin), space.sample(rng, bin)
        kid = space.crossover(rng, a, b, bin)
        for one, two, got in [(a.embd, b.embd, kid.embd), *((a.ffn[a.layers.index(l)], b.ffn[b.layers.index(l)], kid.ffn[kid.layers.index(l)])
                                                             for l in set(a.layers) & set(b.layers) & set(kid.layers))]:
            both, either, got = set(one) & set(two), set(one) | set(two), set(got)
            assert len(got & both)==min(len(got), len(both)) and len(got & either)==min(len(got), len(either))
            mixed += bool(got & set(one) - set(two)) and bool(got & set(two) - set(one))
    assert mixed > 30

def test_mutations_exchange_a_few_entries(net):
    space, rng, bin = SearchSpace(net, 'fine-layerwise', round_to=steps), random.Random(0), ParamBin.around(net.count(net.full), .6, .2)
    a, exchanged = space.sample(rng, bin), 0
    for _ in range(100):
        b = space.mutate(rng, a, bin)
        assert b!=a and net.count(b) in bin
        if b.sizes==a.sizes:
            exchanged += 1
            assert len(set(a.embd) - set(b.embd)) <= max(1, len(a.embd) // 8)
    assert exchanged > 20

def test_the_same_seed_draws_the_same(net):
    bin = ParamBin.around(net.count(net.full), .6, .2)
    one, two = ([*moves(SearchSpace(net, 'fine-uniform', round_to=steps), bin, random.Random(7), 40)] for _ in range(2))
    assert one==two


# Constraints and budgets, against brute force

def llama(**kw):
    "Grouped queries, and a width that need not be heads x head size."
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    cfg = dict(vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24, head_dim=4)
    return LlamaForCausalLM(LlamaConfig(**{**cfg, **kw}))

@pytest.fixture(scope='module')
def nets():
    small = dict(num_hidden_layers=3, num_attention_heads=4, hidden_size=16, intermediate_size=24)
    return [Supernet(tiny_model(**small)), Supernet(tiny_model(tie=True, **small)), Supernet(llama())]


def everything(net, granularity, round_to, at_least, native_only, max_aspect, budgets):
    "All shapes of a space, made without it: a size per layer."
    sizes = {axis: [n for n in range(1, net.sizes[axis] + 1) if n % round_to.get(axis, 1)==0 and n >= at_least.get(axis, 1)]
             for axis in ('layers', 'embd', 'heads', 'ffn')}
    each = [*product(sizes['heads'], sizes['ffn'])]
    for n,e in product(sizes['layers'], sizes['embd']):
        if max_aspect and e > max_aspect * n: continue
        for layers in ([one] * n for one in each) if granularity.endswith('uniform') or native_only else product(each, repeat=n):
            sub = Subnet(tuple(range(n)), range(e), tuple(range(h) for h,_ in layers), tuple(range(f) for _,f in layers))
            if native_only and not net.expressible(sub): continue
            if all(b.of(net, sub) in b for b in budgets): yield n, e, sub


def some_bin(net, rng, measures=MEASURES):
    measure, seq_len, dtype = rng.choice(measures), rng.choice([1, 16, 300]), rng.choice([torch.float32, torch.bfloat16, torch.int8])
    full = net.cost(net.full, measure, seq_len, dtype)
    if rng.random() < .3: return Bin.at_most(max(1, full * rng.uniform(.2, 1)), measure, seq_len=seq_len, dtype=dtype)
    middle, part = full * rng.uniform(.1, 1), rng.choice([.02, .1, .4])
    return Bin(max(1, round(middle * (1 - part))), max(1, round(middle * (1 + part))), measure, seq_len, dtype)


def some_space(net, rng):
    "Arguments of a random space."
    may = lambda p, choices: {axis: rng.choice(values) for axis, values in choices.items() if rng.random() < p}
    return dict(granularity=rng.choice(GRANULARITIES), round_to=dict(embd=rng.choice([3, 4, 8]), ffn=rng.choice([7, 8, 12]), **may(.3, dict(heads=[1, 2]))),
                at_least=may(.3, dict(layers=[1, 2, 3], embd=[1, 5, 8], heads=[1, 2], ffn=[1, 9])), native_only=rng.random() < .3,
                max_aspect=rng.choice([None, None, 4, 6.5, 100]), budgets=[some_bin(net, rng) for _ in range(rng.choice([0, 0, 1, 2]))])


@pytest.mark.parametrize('seed', range(60))
def test_brute_force_agrees(nets, seed):
    "A random space, budgets and bin: what is reachable is what brute force finds, and no move leaves it; or it is refused with the right range."
    rng = random.Random(seed)
    net = rng.choice(nets)
    args, bin = some_space(net, rng), some_bin(net, rng)
    all_bins = [*args['budgets'], bin]
    found = [*everything(net, **{**args, 'budgets': all_bins})]
    try:
        space = SearchSpace(net, orders_=orders('random', net, seed=seed), **args)
        shapes = space.shapes(bin)
    except ValueError as e:
        assert not found
        if said := re.search(r'has ([\d,]+) to ([\d,]+) .*are ([\d,]+) to ([\d,]+)', str(e)):
            number = lambda i: int(said[i].replace(',', ''))
            at = next(i for i,b in enumerate(all_bins) if (b.low, b.high)==(number(1), number(2)) and b.unit in str(e))
            costs = [all_bins[at].of(net, sub) for _,_,sub in everything(net, **{**args, 'budgets': all_bins[:at]})]
            assert (min(costs), max(costs))==(number(3), number(4)) and not any(c in all_bins[at] for c in costs)
        else: assert str(e).startswith(('`max_aspect`', '`native_only`', '`at_least`')) and not [*everything(net, **{**args, 'budgets': ()})]
        return
    assert shapes==list(dict.fromkeys((n, e) for n,e,_ in found))
    for sub in [*moves(space, bin, rng, 40), space.one_shot(bin)]:
        assert all(b.of(net, sub) in b for b in all_bins) and sub in space
        assert len(sub.layers) >= args['at_least'].get('layers', 1) and len(sub.embd) <= len(sub.layers) * (args['max_aspect'] or 1000)
        for axis,sizes in dict(embd=[sub.embd], heads=sub.heads, ffn=sub.ffn).items():
            assert all(len(o) >= args['at_least'].get(axis, 1) and len(o) % args['round_to'].get(axis, 1)==0 for o in sizes)
        assert net.expressible(sub) or not args['native_only']


def test_finer_spaces_contain_coarser_ones(net):
    "Under constraints too, and with the same order; nothing that breaks one of them is contained."
    o, rng, bin = orders('random', net, seed=4), random.Random(0), ParamBin.around(net.count(net.full), .6, .1)
    for more in {}, dict(native_only=True), dict(max_aspect=12, at_least=dict(layers=2, heads=2), budgets=[Bin.at_most(60_000, 'flops', seq_len=16)]):
        spaces = {g: SearchSpace(net, g, o, steps, **more) for g in GRANULARITIES}
        for a,b in product(GRANULARITIES, GRANULARITIES):
            inside = [sub in spaces[b] for sub in moves(spaces[a], bin, rng, 20)]
            if (a.startswith('coarse') or b.startswith('fine')) and (a.endswith('uniform') or b.endswith('layerwise')): assert all(inside)
            elif not more: assert not all(inside)
    loose, strict = SearchSpace(net, orders_=o, round_to=steps), spaces['coarse-layerwise']
    free = [*moves(loose, bin, rng, 100)]
    meets = lambda s: len(s.embd) <= 12 * len(s.layers) and len(s.layers) > 1 and min(map(len, s.heads)) > 1 and net.flops(s, 16) <= 60_000
    assert 0 < sum(map(meets, free)) < len(free) and all((s in strict)==meets(s) for s in free)


@pytest.mark.parametrize('change', [dict(layers=(0, 3)), dict(embd=(*range(1, 16), 0)), dict(embd=(*range(15), 32)),
                                    dict(heads=((0, 1), (2, 1))), dict(ffn=(range(8), range(9)))])
def test_what_is_no_subnet_of_the_teacher_is_in_no_space(net, change):
    sub = dict(layers=(0, 1), embd=tuple(range(16)), heads=((0, 1), (2, 3)), ffn=(tuple(range(8)), tuple(range(8, 16))))
    space = SearchSpace(net, 'fine-layerwise', round_to=steps)
    changed = {axis: tuple(tuple(o) if isinstance(o, range) else o for o in v) for axis,v in change.items()}
    assert Subnet(**sub) in space and Subnet(**{**sub, **changed}) not in space


def test_all_depths_and_widths_are_drawn_alike(deep):
    "And then the heads' totals, although most allocations of heads lie in the middle."
    space, rng = SearchSpace(deep, round_to=steps), random.Random(0)
    bin = ParamBin.around(deep.count(deep.full), .6, .1)
    subs = [space.sample(rng, bin) for _ in range(3000)]
    seen = [(len(s.layers), len(s.embd)) for s in subs]
    shapes, expected = space.shapes(bin), len(subs) / len(space.shapes(bin))
    assert set(seen)==set(shapes) and sum((seen.count(s) - expected)**2 / expected for s in shapes) < len(shapes) + 5 * (2 * len(shapes))**.5     # chi-squared
    n, e = max(shapes, key=lambda s: len({sum(map(len, o.heads)) for o in subs if (len(o.layers), len(o.embd))==s}))
    totals = [sum(map(len, s.heads)) for s in (space._fit(rng, range(n), e, bin, space.inner[0]) for _ in range(2000))]
    heads, first, last = space._room(n, [e], (bin,), space.inner[0])
    fit = heads[first[0] <= last[0]]
    assert set(totals) <= set(fit) and min(totals) <= fit[len(fit) // 20] and max(totals) >= fit[-len(fit) // 20]


@every
def test_what_lies_outside_of_the_bin_is_brought_in(net, granularity):
    "Parents from another bin, as elites of another search are."
    space, rng = SearchSpace(net, granularity, round_to=steps), random.Random(0)
    small, large = (ParamBin.around(net.count(net.full), part, .05) for part in (.4, .8))
    a, b = space.sample(rng, small), space.sample(rng, small)
    for _ in range(30):
        for new in space.mutate(rng, a, large), space.crossover(rng, a, b, large): assert net.count(new) in large and new in space


def test_the_cache_budget_binds_heads_and_leaves_neurons_free():
    "Grouped queries: bytes follow the key/value heads alone."
    net, rng = Supernet(llama(num_hidden_layers=4)), random.Random(0)
    budget = Bin(8 * 16, 9 * 16, 'kv_bytes')                       # a head is 2 x 4 numbers of 2 bytes
    space = SearchSpace(net, round_to=dict(embd=4, ffn=4), budgets=[Bin(5 * 16, 6 * 16, 'kv_bytes')])
    bin = ParamBin(1, 10**9)
    subs = [*moves(space, bin, rng, 100)]
    assert {sum(map(len, s.heads)) for s in subs}=={5, 6} and len({sum(map(len, s.ffn)) for s in subs}) > 10
    with pytest.raises(ValueError, match='has 128 to 144 bytes of KV cache a token.* The nearest has 96: .* Reachable within its budgets are 80 to 96$'):
        space.sample(rng, budget)
    with pytest.raises(ValueError, match='Reachable are 16 to 128$'): SearchSpace(net, round_to=dict(embd=4, ffn=4), budgets=[Bin(129, 140, 'kv_bytes')])


@pytest.mark.parametrize('make,message', [
    (lambda net: SearchSpace(net, at_least=dict(ffn=42), round_to=steps), "`at_least` has ffn=42; give at most 40 .the teacher's 41, in steps of 8."),
    (lambda net: SearchSpace(net, at_least=dict(depth=2)), '`at_least` has depth; give layers, embd, heads, ffn'),
    (lambda net: SearchSpace(net, max_aspect=5, round_to=steps, at_least=dict(embd=17)), '`max_aspect` is 5; it must be at least 8 .24 / 3.'),
    (lambda net: Bin(1, 2, 'heads'), "`measure` is 'heads'; choose one of"), (lambda net: Bin.at_most(10, 'flops'), '`flops` need `seq_len`'),
    (lambda net: Bin(1.2, 1.8), 'a whole number in it'), (lambda net: Bin(1, float('inf')), 'high=inf')])
def test_impossible_constraints(make, message):
    with pytest.raises(ValueError, match=message): make(Supernet(tiny_model(intermediate_size=41)))


def test_heads_may_be_cut_inside():
    "Query heads and head sizes that a space allows are drawn, changed and crossed, and nothing leaves bin or space."
    from transformers import LlamaConfig, LlamaForCausalLM
    cfg = LlamaConfig(vocab_size=96, hidden_size=48, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, head_dim=8, intermediate_size=64)
    net, rng = Supernet(LlamaForCausalLM(cfg)), random.Random(0)
    bin = ParamBin.around(net.count(net.full), .5)
    for granularity in GRANULARITIES:
        space = SearchSpace(net, granularity, round_to=dict(embd=8, ffn=8), query_heads=[1, 3, 4], head_sizes=[4, 8], budgets=[Bin.at_most(500, 'kv_bytes')])
        subs = [space.sample(rng, bin) for _ in range(40)]
        children = [space.mutate(rng, s, bin) for s in subs] + [space.crossover(rng, *rng.sample(subs, 2), bin) for _ in subs]
        assert {space.inner_of(s) for s in subs}=={(q, d) for q in (1, 3, 4) for d in (4, 8)}
        assert any(space.inner_of(s)!=space.inner_of(c) for s, c in zip(subs, children))
        for s in subs + children:
            assert s in space and net.count(s) in bin and net.count(s)==net.extract(s).num_parameters() and net.cost(s, 'kv_bytes') <= 500
        a = subs[0]
        child = space.crossover(rng, a, a, bin)
        assert space.inner_of(child)==space.inner_of(a) and child.queries==a.queries
        if space.fine: assert len({s.queries for s in subs if space.inner_of(s)[0]==3}) > 5        # not always the first ones
        else: assert space.one_shot(bin) in space
    assert SearchSpace(net, head_sizes=[4, 8], native_only=True).inner==[(4, 8)]
    for wrong in dict(query_heads=[5]), dict(head_sizes=[3]), dict(head_sizes=[9]), dict(query_heads=[0]):
        with pytest.raises(ValueError): SearchSpace(net, **wrong)
