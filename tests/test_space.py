"space: bins at the extremes, teachers with almost nothing to choose from, and that no move ever leaves the bin or the space."
import random

import pytest
from conftest import tiny_model

from slm_begin.importance import orders
from slm_begin.space import GRANULARITIES, ParamBin, SearchSpace
from slm_begin.supernet import Supernet

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
    def count(at): return space.supernet.count_sizes(n := space.ranges['layers'][at], space.ranges['embd'][at], n * space.ranges['heads'][at], n * space.ranges['ffn'][at])
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
            with pytest.raises(ValueError, match=f'Reachable are {low:,} to {high:,}$'): move(bin)


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
    from itertools import product
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
    (lambda net: SearchSpace(net, round_to=dict(ffn=0)), 'ffn=0'), (lambda net: SearchSpace(net, round_to=dict(width=2)), '`round_to` has width; the axes are layers, embd, heads, ffn'),
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
