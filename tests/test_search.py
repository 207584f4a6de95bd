"search: killed at any moment and replayed, nothing scored twice, nothing outside the bin, budgets kept, methods, and what odd fitnesses do."
import json
import math
import os
import random
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_model

from slm_begin.data import read_lines
from slm_begin.fitness import Fitness, Jury, Objective, Scores
from slm_begin.search import (
    METHODS,
    Budget,
    Candidate,
    Search,
    SearchConfig,
    View,
    coarse_to_fine,
    extrapolate,
    front,
    lower_part,
    progress_html,
    rerank,
    search,
    search_bins,
    settled,
)
from slm_begin.space import GRANULARITIES, ParamBin, SearchSpace
from slm_begin.supernet import Subnet, Supernet, mean_loss

quiet = dict(say=lambda line: None)
cfg = SearchConfig(population=8, generations=3, elites=3, mutate=3, crossover=2, immigrants=1, seed=5)
steps = dict(embd=8, ffn=8)


pytestmark = pytest.mark.usefixtures('one_thread')


def made(granularity='coarse-layerwise', **kw):
    "Everything a search needs, the same in every process."
    net = Supernet(tiny_model(**kw), 'tiny')
    return SearchSpace(net, granularity, round_to=steps), ParamBin.around(net.count(net.full), .5, .1)

def windows(n=8): return torch.randint(128, (n, 17), generator=torch.Generator().manual_seed(0))

class Asked(Fitness):
    "Writes down what it is asked; a killed process leaves the file."
    def __init__(self, net, path): super().__init__(net, windows()), setattr(self, 'path', path)
    def score(self, sub, start=0, stop=None):
        with open(self.path, 'a') as f: f.write(f'{sub.key} {start} {stop}\n')
        return super().score(sub, start, stop)
    @property
    def asked(self): return self.path.read_text().splitlines() if self.path.exists() else []

class MadeUp(Objective):
    "A fitness that needs no model; `loss` of a sub-network."
    def __init__(self, loss):
        self.asked = []
        super().__init__(lambda s: self.asked.append(s.key) or loss(s), 'made up')
    def price(self, sub, pieces=None): return (1, 2) if pieces is None else (pieces, 2 * pieces)


def comparable(history):
    "Without the time that it took."
    return [{k: v for k, v in h.items() if 'seconds' not in k} for h in history]


# Killed and replayed

def searched(out, log, die_at=None, moment='between', slowly=0):
    "A search in a process of its own, which kills itself with SIGKILL after `die_at` measurements."
    space, bin = made()
    fitness = Asked(space.supernet, log)
    def die(): os.kill(os.getpid(), signal.SIGKILL)
    def stop():
        time.sleep(slowly)
        if die_at and moment=='between' and len(fitness.asked) >= die_at: die()
    if moment=='in a line':
        from slm_begin import fitness as scores, search as history
        whole = scores.append_line
        def half(path, line):
            if len(fitness.asked) < die_at: return whole(path, line)
            with open(path, 'ab') as f: f.write(json.dumps(line).encode()[:random.Random(die_at).randint(1, 60)])
            die()
        scores.append_line = history.append_line = half
    return search(space, bin, fitness, cfg, out, [space.one_shot(bin)], stop=stop, **quiet)


def test_20_kills_and_one_clean_end_give_the_history_of_no_kill(processes, tmp_path):
    whole = searched(tmp_path/'whole', tmp_path/'whole.log')
    out, log, rng = tmp_path/'killed', tmp_path/'killed.log', random.Random(0)
    def measured(): return sum(f.read_bytes().count(b'\n') for f in out.glob('scores-*.jsonl'))
    for _ in range(20):
        before = measured()
        p = processes(searched, out, log, None, 'between', .004)
        until = time.time() + 60
        while measured() < before + rng.randint(1, 3) and p.is_alive() and time.time() < until: time.sleep(.001)
        time.sleep(rng.random()*.01)                                # at any moment: while measuring, deciding, writing
        os.kill(p.pid, signal.SIGKILL)
        p.join()
    again = searched(out, log)
    assert comparable(again.history)==comparable(whole.history)==comparable(read_lines(out/'history.jsonl'))
    assert again.best==whole.best and {k: v for k, v in again.account.items() if k in ('evaluations', 'tokens', 'flops')}.items() <= whole.account.items()
    asked = log.read_text().splitlines()
    assert len(asked) - len(set(asked)) <= 20                       # at each kill at most what was just being measured


@pytest.mark.parametrize('die_at', [1, 5, 9, 14, 20])
def test_killed_in_the_middle_of_a_line(processes, tmp_path, die_at):
    whole = searched(tmp_path/'whole', tmp_path/'whole.log')
    p = processes(searched, tmp_path/'cut', tmp_path/'cut.log', die_at, 'in a line')
    p.join()
    assert p.exitcode==-signal.SIGKILL
    again = searched(tmp_path/'cut', tmp_path/'cut.log')
    assert comparable(again.history)==comparable(whole.history)==comparable(read_lines(tmp_path/'cut'/'history.jsonl'))


def test_the_history_only_grows(tmp_path):
    "A resumed search writes nothing again and changes nothing that is there."
    searched(tmp_path/'s', tmp_path/'log')
    before, asked = (tmp_path/'s'/'history.jsonl').read_bytes(), (tmp_path/'log').read_text()
    lines = before.splitlines(keepends=True)
    (tmp_path/'s'/'history.jsonl').write_bytes(b''.join(lines[:11]))
    again = searched(tmp_path/'s', tmp_path/'log')
    assert (tmp_path/'s'/'history.jsonl').read_bytes()==before and (tmp_path/'log').read_text()==asked
    assert again.history==read_lines(tmp_path/'s'/'history.jsonl')


def test_stop_and_go_on(tmp_path):
    whole = searched(tmp_path/'whole', tmp_path/'a.log')
    space, bin = made()
    fitness = Asked(space.supernet, tmp_path/'b.log')
    go = lambda stop: search(space, bin, fitness, cfg, tmp_path/'parts', [space.one_shot(bin)], stop=stop, **quiet)
    for n in range(0, len(whole.history), 4):
        with pytest.raises(KeyboardInterrupt, match='goes on from there'): go(lambda n=n: len(fitness.asked) > n)
    assert comparable(go(None).history)==comparable(whole.history) and len(fitness.asked)==len({*fitness.asked})
    with pytest.raises(KeyboardInterrupt, match='are lost'): search(space, bin, fitness, cfg, stop=lambda: True, **quiet)


def test_an_error_of_the_fitness_loses_nothing(tmp_path):
    space, bin = made()
    asked = []
    def loss(sub):
        asked.append(sub.key)
        if len(asked)==7: raise RuntimeError('something broke')
        return float(len(sub.embd))
    with pytest.raises(RuntimeError, match='something broke'): search(space, bin, MadeUp(loss), cfg, tmp_path, **quiet)
    result = search(space, bin, MadeUp(loss), cfg, tmp_path, **quiet)
    assert len(asked)==len(result.history) + 1 and result.history==read_lines(tmp_path/'history.jsonl')


@pytest.mark.parametrize('change', ['seed', 'bin', 'windows', 'teacher', 'method', 'space', 'order', 'first'])
def test_another_search_in_the_folder_is_refused(tmp_path, change):
    searched(tmp_path, tmp_path/'log')
    before = (tmp_path/'history.jsonl').read_text()
    space, bin = made(seed=1) if change=='teacher' else made()
    fitness = Fitness(space.supernet, windows()[:, :16] if change=='windows' else windows())
    if change=='bin': bin = ParamBin(bin.low, bin.high - 1)
    if change=='space': space = SearchSpace(space.supernet, 'coarse-uniform', round_to=steps)
    if change=='order': space.orders.embd = space.orders.embd[::-1]
    other = replace(cfg, **dict(seed=dict(seed=6), method=dict(method='local')).get(change, {}))
    first = [] if change=='first' else [space.one_shot(bin)]
    with pytest.raises(ValueError, match='holds another search'): search(space, bin, fitness, other, tmp_path, first, **quiet)
    assert (tmp_path/'history.jsonl').read_text()==before


# What is scored

def test_nothing_is_scored_twice_and_nothing_outside_the_bin(tmp_path):
    "A space so small that moves repeat themselves all the time, and that is exhausted before the budget."
    net = Supernet(tiny_model(num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=16))
    space, bin = SearchSpace(net, round_to=steps), ParamBin.around(net.count(net.full), .8, .1)
    for method in 'evolve', 'random', 'local':
        fitness = MadeUp(lambda s: (net.count(s) * 7919 % 1000)/100)
        result = search(space, bin, fitness, replace(cfg, generations=None), tmp_path/method, method=method, budget=Budget(evaluations=500), **quiet)
        keys = [h['key'] for h in result.history]
        assert fitness.asked==keys and len(set(keys))==len(keys) < 500 and all(h['parameters'] in bin for h in result.history)
        assert result.account['evaluations']==len(keys) and result.account['flops']==2*len(keys)
        assert [h['index'] for h in result.history]==list(range(len(keys)))


def test_an_unreachable_bin_asks_for_nothing(tmp_path):
    space, _ = made()
    for method in METHODS:
        fitness = MadeUp(lambda s: 1.)
        with pytest.raises(ValueError, match=r'The nearest has [\d,]+: Subnet.*Reachable are'):
            search(space, ParamBin(10, 20), fitness, cfg, tmp_path/'s', method=method, **quiet)
        assert not fitness.asked and not (tmp_path/'s').exists()


def test_a_given_subnet_outside_of_bin_or_space_is_refused():
    space, bin = made()
    fitness = MadeUp(lambda s: 1.)
    with pytest.raises(ValueError, match='outside of ParamBin'): search(space, bin, fitness, cfg, first=[space.supernet.full], **quiet)
    uniform = SearchSpace(space.supernet, 'coarse-uniform', round_to=steps)
    rng = random.Random(0)
    uneven = next(s for s in (space.sample(rng, bin) for _ in range(1000)) if s not in uniform)
    with pytest.raises(ValueError, match='none of the sub-networks of'): search(uniform, bin, fitness, cfg, first=[uneven], **quiet)
    assert not fitness.asked


def test_the_history_tells_everything():
    space, bin = made()
    result = search(space, bin, Fitness(space.supernet, windows()), cfg, first=[space.one_shot(bin)], confidence=1, **quiet)
    seen = {}
    for h in result.history:
        sub = Subnet.from_json(h['subnet'])
        assert sub.key==h['key'] and sub.sizes==h['sizes'] and space.supernet.count(sub)==h['parameters'] in bin and sub in space
        assert h['flops']==128 * space.supernet.flops(sub, 16) and h['tokens']==128 and h['pieces']==8
        assert h['loss']==pytest.approx(mean_loss(space.supernet.extract(sub), windows()), abs=1e-5)
        assert len(h['parents'])==dict(given=0, sample=0, immigrant=0, mutate=1, crossover=2)[h['origin']]
        for p in h['parents']:                                      # parents were among the best before this generation
            earlier = sorted(o['loss'] for o in seen.values() if o['generation'] < h['generation'])
            assert seen[p]['loss'] <= earlier[cfg.elites - 1]
        seen[h['key']] = h
        assert h['best'] <= min(o['loss'] for o in seen.values()) + 1e-6
    assert result.account.items() >= dict(evaluations=len(seen), **{k: sum(h[k] for h in seen.values()) for k in ('tokens', 'flops')}).items()
    assert result.account['seconds']==pytest.approx(sum(h['seconds'] for h in seen.values()), abs=.01)
    assert result.best.loss==min(h['loss'] for h in result.history) and result.history[-1]['total_tokens']==result.account['tokens']


def test_racing_finds_the_same_elites_for_less():
    space, bin = made()
    fitness, scores = Fitness(space.supernet, windows(64)), Scores()
    for seed in range(5):
        full, raced = (search(space, bin, fitness, cfg, scores=scores, seed=seed, confidence=c, **quiet) for c in (1, .9999))
        assert raced.best.subnet==full.best.subnet and raced.best.loss==full.best.loss and raced.account['tokens'] < full.account['tokens']
        assert [h['key'] for h in raced.history]==[h['key'] for h in full.history]
        assert raced.account['tokens'] >= sum(h['tokens'] for h in raced.history)               # elites may have read on later


def test_what_others_have_measured_serves_and_changes_nothing(tmp_path):
    space, bin = made()
    fitness = Asked(space.supernet, tmp_path/'log')
    kw = dict(scores=tmp_path/'scores', first=[space.one_shot(bin)], **quiet)
    alone = search(space, bin, fitness, cfg, tmp_path/'a', **kw)
    assert alone.account['measured_tokens']==alone.account['tokens']
    again = search(space, bin, fitness, cfg, tmp_path/'b', **kw)
    assert comparable(again.history)==comparable(alone.history) and again.account['measured_tokens']==0 and again.account['tokens']==alone.account['tokens']
    other = search(space, bin, fitness, cfg, tmp_path/'c', seed=9, **kw)
    assert 0 < other.account['measured_tokens'] < other.account['tokens'] and len(fitness.asked)==len({*fitness.asked})


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_candidate_without_a_loss_is_never_the_best(tmp_path, bad):
    space, bin = made()
    fitness = MadeUp(lambda s: bad if len(s.layers)==2 else len(s.embd) + len(s.layers)/10)
    result = search(space, bin, fitness, cfg, tmp_path, **quiet)
    good, broken = ([h for h in result.history if (h['loss'] is None)==b] for b in (False, True))
    assert broken and all(h['error']=='not a number' for h in broken) and result.best.loss==min(h['loss'] for h in good)
    assert not {h['key'] for h in broken} & {p for h in result.history for p in h['parents']}
    assert search(space, bin, fitness, cfg, tmp_path, **quiet).history==result.history
    assert 'NaN' not in (tmp_path/'history.jsonl').read_text()


def test_a_candidate_that_does_not_fit_into_memory_is_noted(tmp_path):
    space, bin = made()
    class Small(Fitness):
        def model(self, sub):
            if len(sub.layers)==3: raise torch.OutOfMemoryError('CUDA out of memory')
            return super().model(sub)
    result = search(space, bin, Small(space.supernet, windows()), cfg, tmp_path, **quiet)
    lost = [h for h in result.history if len(h['sizes']['layers'])==3]
    assert lost and all(h['error']=='out of memory' and h['loss'] is None for h in lost) and len(result.best.subnet.layers) < 3


def test_nothing_but_broken_candidates():
    space, bin = made()
    result = search(space, bin, MadeUp(lambda s: math.nan), cfg, **quiet)
    assert result.best.loss==math.inf and len(result.history) > 1


def test_the_global_random_state_has_no_say_and_is_left_alone():
    space, bin = made()
    histories = []
    for seed in 1, 2:
        random.seed(seed), torch.manual_seed(seed), np.random.seed(seed)
        before = random.getstate(), torch.random.get_rng_state().tolist(), np.random.get_state()[1].tolist()
        histories.append(comparable(search(space, bin, Fitness(space.supernet, windows()), cfg, **quiet).history))
        assert (random.getstate(), torch.random.get_rng_state().tolist(), np.random.get_state()[1].tolist())==before
    assert histories[0]==histories[1]


# Budgets and settings

@pytest.mark.parametrize('method', ['evolve', 'random', 'local'])
@pytest.mark.parametrize('kind,limit', [('evaluations', 23), ('tokens', 1500), ('flops', 4e7)])
@pytest.mark.parametrize('confidence', [1, .99])
def test_a_budget_is_never_exceeded_and_nearly_used(method, kind, limit, confidence):
    space, bin = made()
    fitness = Fitness(space.supernet, windows())
    result = search(space, bin, fitness, replace(cfg, generations=None), method=method, budget=Budget(**{kind: limit}), confidence=confidence, **quiet)
    price = dict(zip(('tokens', 'flops'), np.max([fitness.price(Subnet.from_json(h['subnet'])) for h in result.history], 0)), evaluations=0)[kind]
    assert limit - (cfg.elites + 1) * price <= result.account[kind] <= limit
    assert result.best.pieces==8                                    # the winner was read in full all the same


def test_seconds_and_several_budgets_at_once():
    space, bin = made()
    class Slow(MadeUp):
        def score(self, sub, start=0, stop=1): time.sleep(.02); return super().score(sub, start, stop)
    result = search(space, bin, Slow(lambda s: len(s.embd)), method='random', budget=Budget(seconds=1), **quiet)
    assert .5 < result.account['seconds'] < 1.2
    result = search(space, bin, MadeUp(lambda s: len(s.embd)), method='random', budget=Budget(evaluations=9, tokens=100), **quiet)
    assert len(result.history)==9


def test_a_budget_for_less_than_one_candidate():
    space, bin = made()
    with pytest.raises(ValueError, match=r'does not suffice for one candidate: one takes about 128 tokens'):
        search(space, bin, Fitness(space.supernet, windows()), budget=Budget(tokens=100), **quiet)


def test_longer_searches_begin_like_shorter_ones():
    space, bin = made()
    for method in 'random', 'evolve', 'local':
        kw = dict(method=method, generations=None, **quiet)
        short, long = (search(space, bin, MadeUp(lambda s: len(s.embd)), cfg, budget=Budget(evaluations=n), **kw).history for n in (5, 30))
        assert [h['key'] for h in long[:5]]==[h['key'] for h in short] and len(long)==30


@pytest.mark.parametrize('kw,message', [
    (dict(population=0, elites=0), '`population` is 0'), (dict(elites=0), '`elites` is 0'), (dict(generations=-1), '`generations` is -1'),
    (dict(mutate=-1), '`mutate` is -1'), (dict(mutate=0, crossover=0, immigrants=0), 'a generation has no children'),
    (dict(method='anneal'), "`method` is 'anneal'"), (dict(confidence=.3), '`confidence` is 0.3'), (dict(elites=99), '`elites` is 99; it must not exceed'),
    (dict(finalists=0), '`finalists` is 0'), (dict(niches=0), '`niches` is 0')])
def test_impossible_settings(kw, message):
    with pytest.raises(ValueError, match=message): SearchConfig(**kw)


@pytest.mark.parametrize('kw', [dict(evaluations=0), dict(tokens=-1), dict(flops=math.inf), dict(seconds=0)])
def test_impossible_budgets(kw):
    with pytest.raises(ValueError, match=f'`{next(iter(kw))}` is'): Budget(**kw)


def test_wrong_kinds():
    space, bin = made()
    with pytest.raises(TypeError, match='`fitness` is 3'): search(space, bin, 3)
    with pytest.raises(ValueError, match="`objectives` has 'speed'; choose of parameters"): search(space, bin, MadeUp(lambda s: 1.), objectives=['speed'])
    with pytest.raises(TypeError, match='popsize'): search(space, bin, MadeUp(lambda s: 1.), popsize=3)
    assert len(search(space, bin, MadeUp(lambda s: 1.), population=1, elites=1, generations=0, **quiet).history)==1


# Methods

@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('method', METHODS)
def test_every_method_in_every_space(granularity, method):
    space, bin = made(granularity)
    fitness = MadeUp(lambda s: space.supernet.count(s) / 1e4 + len(s.layers))
    objectives = ['flops'] if method=='nsga2' else []
    kw = dict(method=method, population=8, elites=3, budget=Budget(evaluations=20), objectives=objectives, **quiet)
    histories = [search(space, bin, fitness, **kw).history for _ in range(2)]
    assert comparable(histories[0])==comparable(histories[1])
    assert len(histories[0])==(1 if method in ('one-shot', 'first-layers') else 20)
    assert all(Subnet.from_json(h['subnet']) in space and h['parameters'] in bin for h in histories[0])


@pytest.mark.parametrize('method', ['evolve', 'local'])
def test_a_search_beats_chance_where_there_is_something_to_find(method):
    "A smooth objective with one best shape: better than random draws of the same number in most of ten seeds."
    space, bin = made(num_hidden_layers=6, num_attention_heads=8, intermediate_size=96)
    far = lambda s: abs(len(s.embd) - 24) / 8 + sum(abs(len(h) - 2) for h in s.heads) + sum(abs(len(f) - 40) / 8 for f in s.ffn) + 3 * (s.layers[0] != 1)
    best = lambda m, seed: search(space, bin, MadeUp(far), method=m, seed=seed, population=12, elites=3, budget=Budget(evaluations=60), **quiet).best.loss
    assert sum(best(method, seed) < best('random', seed) for seed in range(10)) >= 7


def test_first_layers_is_the_lower_part():
    space, bin = made(num_hidden_layers=6)
    sub = lower_part(space, bin)
    assert list(sub.layers)==list(range(len(sub.layers))) and len(sub.embd)==max(e for _, e in space.shapes(bin)) and space.supernet.count(sub) in bin
    whole = ParamBin(*[space.supernet.count(space.supernet.subnet(range(3)))] * 2)
    assert lower_part(space, whole)==space.supernet.subnet(range(3))                            # where it fits, whole layers


def test_niches_keep_the_best_of_each_depth():
    space, bin = made(num_hidden_layers=6)
    fitness = MadeUp(lambda s: len(s.layers) + len(s.embd)/100)
    def go(**kw): return search(space, bin, fitness, population=20, elites=6, budget=Budget(evaluations=80), **kw, **quiet)
    plain, niched = go(finalists=6), go(niches=6, finalists=6)
    assert len({len(c.subnet.layers) for c in niched.finalists})==len({len(h['sizes']['layers']) for h in niched.history}) > 3
    for c in niched.finalists:
        alike = [h['loss'] for h in niched.history if len(h['sizes']['layers'])==len(c.subnet.layers)]
        assert c.loss==min(alike)
    assert len({len(c.subnet.layers) for c in plain.finalists}) < 3 and plain.finalists[0]==plain.best


def test_a_method_of_ones_own():
    "Methods are generators; a search gives them everything else."
    @(lambda f: METHODS.setdefault('widest', f))
    def widest(s: Search):
        yield [s.new(lambda n=n, e=e: (s.space.fit(s.rng, range(n), e, s.bin, [2] * n, [16] * n), 'widest')) for n, e in s.space.shapes(s.bin)]
    try:
        space, bin = made()
        result = search(space, bin, MadeUp(lambda s: -len(s.embd)), method='widest', **quiet)
        assert len(result.best.subnet.embd)==max(e for _, e in space.shapes(bin))
    finally: del METHODS['widest']


# Several spaces, bins, aims

def test_finer_spaces_never_end_worse():
    results = []
    for seed in range(3):
        spaces = [made(g)[0] for g in ('coarse-uniform', 'coarse-layerwise', 'fine-layerwise')]
        for s in spaces[1:]: s.supernet = spaces[0].supernet
        fitness = Fitness(spaces[0].supernet, windows())
        results.append(coarse_to_fine(spaces, made()[1], fitness, replace(cfg, generations=1, seed=seed), **quiet))
        losses = [r.best.loss for r in results[-1]]
        assert losses==sorted(losses, reverse=True)
        for coarse, fine in zip(results[-1], results[-1][1:]): assert coarse.best.subnet.key in {h['key'] for h in fine.history}


def test_bins_share_what_they_can(tmp_path):
    space, _ = made()
    full = space.supernet.count(space.supernet.full)
    bins = [ParamBin.around(full, f, .1) for f in (.5, .55, .3)]                                # the first two overlap
    fitness = Asked(space.supernet, tmp_path/'log')
    results = search_bins(space, bins, fitness, cfg, tmp_path/'bins', **quiet)
    assert all(h['parameters'] in b for r, b in zip(results, bins) for h in r.history)
    given = [{h['key'] for h in r.history if h['origin']=='given'} for r in results]
    assert not given[0] and given[1] and given[2]
    assert len(fitness.asked)==len({*fitness.asked}) and sum(r.account['measured_tokens'] for r in results) < sum(r.account['tokens'] for r in results)
    with pytest.raises(ValueError, match='Reachable are'): search_bins(space, [bins[0], ParamBin(1, 2)], fitness, cfg, **quiet)


def test_the_front_against_brute_force():
    pytest.importorskip('optuna')
    space, bin = made()[0], ParamBin.around(20_000, 1, .6)
    result = search(space, bin, MadeUp(lambda s: 1e4 / space.supernet.count(s) + len(s.layers) % 2), cfg, method='nsga2', objectives=['flops', 'kv_bytes'],
                    budget=Budget(evaluations=40), generations=None, **quiet)
    points = {h['key']: (h['loss'], h['objectives']['flops'], h['objectives']['kv_bytes']) for h in result.history}
    assert all(p[1]==space.supernet.cost(Subnet.from_json(h['subnet']), 'flops', 1) for h, p in zip(result.history, points.values()))
    beaten = lambda p: any(all(a <= b for a, b in zip(q, p)) and q != p for q in points.values())
    assert front(result.history, 'flops', 'kv_bytes')=={k for k, p in points.items() if not beaten(p)}


# After a short training

def test_reranking_is_by_where_the_curve_goes_and_resumes(tmp_path):
    space, bin = made()
    rng = random.Random(0)
    a, b = (Candidate(space.sample(rng, bin), loss, 1) for loss in (5., 6.))
    curves, trained = {a.subnet.key: [(0, 5.), (10, 4.), (20, 3.9)], b.subnet.key: [(0, 6.), (10, 4.5), (20, 4.)]}, []
    def train(sub):
        trained.append(sub.key)
        return curves[sub.key], dict(tokens=20, flops=100, seconds=.1)
    by = lambda how: [t.candidate for t in rerank([a, b], train, 80, tmp_path, by=how, **quiet)]
    assert by('now')==[a, b] and by('predicted')==[b, a] and trained==[a.subnet.key, b.subnet.key]
    assert [t.predicted for t in rerank([a, b], train, 80, tmp_path, **quiet)]==pytest.approx([4 * (4/4.5)**2, 3.9 * (3.9/4)**2])
    with pytest.raises(ValueError, match="`by` is 'luck'"): by('luck')


def test_curves_that_no_power_law_fits():
    assert extrapolate([(10, math.nan), (20, 4.)], 80)==extrapolate([(10, 4.), (20, math.nan)], 80)==math.inf
    assert extrapolate([(10, 4.), (20, 2.9)], 80, floor=3.)==2.9


def test_the_end_of_a_history_is_what_was_measured():
    "Estimates of the finalists give way to what was measured, and of others stay; the winner is marked."
    lines = [dict(key=k, loss=loss, pieces=2, best=4.) for k, loss in (('a', 4.), ('b', 5.), ('c', 4.5))]
    told = settled(lines, [dict(key='b', loss=4.2, pieces=8), dict(key='c', loss=4.4, pieces=4)])
    assert [(h['loss'], h['pieces'], h.get('final', False)) for h in told]==[(4., 2, False), (4.2, 8, True), (4.4, 4, False)]
    assert told[-1]['best']==4.2 and lines[1]['loss']==5.


# What is seen

def test_lines_and_html():
    space, bin = made()
    lines = []
    search(space, bin, MadeUp(lambda s: len(s.embd)), cfg, say=lines.append)
    assert lines and lines[-1].startswith('search: generation ') and '(100%)' in lines[-1] and '0:00 left' in lines[-1]
    state = dict(method='<script>', generation=1, evaluations=5, done=.5, best=4., tokens=1000, flops=1e9, seconds=2., left=None)
    assert '<script' not in progress_html(state) and 'value="0.500"' in progress_html(state)


def test_a_view_is_not_asked_too_often():
    shown = []
    view = View(shown.append)
    for i in range(1000): view(dict(method='m', generation=i, evaluations=i, done=.1, best=1., tokens=1, flops=1, seconds=1., left=1.))
    assert len(shown)==1


def test_a_broken_view_is_not_hidden(tmp_path):
    space, bin = made()
    def say(line): raise BrokenPipeError('no one listens')
    with pytest.raises(BrokenPipeError): search(space, bin, MadeUp(lambda s: 1.), cfg, tmp_path, say=say)
    assert len(read_lines(tmp_path/'history.jsonl'))==8


def test_a_jury_of_a_search_is_the_one_of_the_fitness_chapter():
    space, bin = made()
    fitness = Fitness(space.supernet, windows())
    with pytest.raises(ValueError, match='`confidence` is 2'): Jury(fitness, confidence=2)
