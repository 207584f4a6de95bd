"search: killed at any moment and replayed, nothing scored twice, nothing scored outside the bin, and what odd fitnesses do."
import json
import math
import os
import random
import signal

import pytest
import torch
from conftest import tiny_model

from slm_begin.data import read_lines
from slm_begin.search import Fitness, SearchConfig, evolve, random_search
from slm_begin.space import ParamBin, SearchSpace
from slm_begin.supernet import Subnet, Supernet, mean_loss

quiet = dict(say=lambda line: None)
cfg = SearchConfig(population=8, generations=3, elites=3, mutate=3, crossover=2, immigrants=1, seed=5)
steps = dict(embd=8, ffn=8)


def made(**kw):
    "Everything a search needs, the same in every process."
    net = Supernet(tiny_model(**kw), 'tiny')
    return SearchSpace(net, round_to=steps), ParamBin.around(net.count(net.full), .5, .1)

def windows(): return torch.randint(128, (2, 17), generator=torch.Generator().manual_seed(0))

class Asked(Fitness):
    "Writes down what it is asked; a killed process leaves the file."
    def __init__(self, net, path): super().__init__(net, windows()), setattr(self, 'path', path)
    def __call__(self, sub):
        with open(self.path, 'a') as f: f.write(sub.key + '\n')
        return super().__call__(sub)
    @property
    def asked(self): return self.path.read_text().split() if self.path.exists() else []

class MadeUp:
    "A fitness that needs no model; `loss` of a sub-network."
    tokens = 1
    def __init__(self, loss): self.loss, self.windows, self.asked = loss, windows(), []
    def flops(self, sub): return 2
    def __call__(self, sub):
        self.asked.append(sub.key)
        return self.loss(sub)


def comparable(history):
    "Without the time that it took."
    return [{k:v for k,v in h.items() if k!='seconds'} for h in history]


def searched(out, log, die_at=None, moment='between'):
    "A search in a process of its own, which kills itself with SIGKILL after `die_at` evaluations."
    space, bin = made()
    fitness = Asked(space.supernet, log)
    def die(): os.kill(os.getpid(), signal.SIGKILL)
    def stop():
        if die_at and moment=='between' and len(fitness.asked) >= die_at: die()
    if moment=='while resuming':
        from slm_begin import search
        search.os.replace = lambda a, b: die()
    if moment=='in a line':
        dumps = json.dumps
        def half(o, **kw):
            if 'origin' in o and len(fitness.asked) >= die_at:
                with open(out/'history.jsonl', 'a') as f: f.write(dumps(o)[:200])
                die()
            return dumps(o, **kw)
        from slm_begin import search
        search.json.dumps = half
    return evolve(space, bin, fitness, cfg, out, first=[space.one_shot(bin)], stop=stop, **quiet)


def test_kill_9_and_resume_gives_the_same_history(processes, tmp_path):
    whole = searched(tmp_path/'whole', tmp_path/'whole.log')
    out, log = tmp_path/'killed', tmp_path/'killed.log'
    for die_at,moment in [(3, 'between'), (9, 'in a line'), (9, 'while resuming'), (15, 'between'), (21, 'in a line'), (21, 'while resuming')]:
        p = processes(searched, out, log, die_at, moment)
        p.join()
        assert p.exitcode==-signal.SIGKILL, (die_at, moment)
    again = searched(out, log)
    assert comparable(again.history)==comparable(whole.history)==comparable(read_lines(out/'history.jsonl'))
    assert again.best.subnet==whole.best.subnet and all(again.account[k]==v for k,v in whole.account.items() if k!='seconds')
    asked = log.read_text().split()
    assert len(asked) - len(set(asked)) <= 2                        # only what was measured but not written down yet: the two cut lines
    assert sorted(f.name for f in out.iterdir())==['history.jsonl', 'search.json']


def test_a_finished_search_is_read_not_measured(tmp_path):
    first = searched(tmp_path/'s', tmp_path/'log')
    before = (tmp_path/'log').read_text()
    again = searched(tmp_path/'s', tmp_path/'log')
    assert again.history==first.history and (tmp_path/'log').read_text()==before


def test_nothing_is_scored_twice_and_nothing_outside_the_bin(tmp_path):
    "A space so small that moves repeat themselves all the time."
    net = Supernet(tiny_model(num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=16))
    space, bin = SearchSpace(net, round_to=steps), ParamBin.around(net.count(net.full), .8, .1)
    fitness = MadeUp(lambda s: (net.count(s) * 7919 % 1000)/100)
    for run in lambda: evolve(space, bin, fitness, cfg, tmp_path/'e', **quiet), lambda: random_search(space, bin, fitness, 30, out=tmp_path/'r', **quiet):
        fitness.asked.clear()
        result = run()
        keys = [h['key'] for h in result.history]
        assert fitness.asked==keys and len(set(keys))==len(keys) and all(h['parameters'] in bin for h in result.history)
        assert result.account['evaluations']==len(keys) and result.account['flops']==2*len(keys)
        assert [h['index'] for h in result.history]==list(range(len(keys)))


def test_an_unreachable_bin_asks_for_nothing(tmp_path):
    space, _ = made()
    fitness = MadeUp(lambda s: 1.)
    for search in lambda b: evolve(space, b, fitness, cfg, tmp_path/'s', **quiet), lambda b: random_search(space, b, fitness, 5, out=tmp_path/'s', **quiet):
        with pytest.raises(ValueError, match='Reachable are'): search(ParamBin(10, 20))
    assert not fitness.asked and not (tmp_path/'s').exists()


def test_a_given_subnet_outside_the_bin_is_refused():
    space, bin = made()
    fitness = MadeUp(lambda s: 1.)
    with pytest.raises(ValueError, match='outside of ParamBin'): evolve(space, bin, fitness, cfg, first=[space.supernet.full], **quiet)
    assert not fitness.asked


def test_stop_and_go_on(tmp_path):
    whole = searched(tmp_path/'whole', tmp_path/'a.log')
    space, bin = made()
    fitness = Asked(space.supernet, tmp_path/'b.log')
    go = lambda stop: evolve(space, bin, fitness, cfg, tmp_path/'parts', first=[space.one_shot(bin)], stop=stop, **quiet)
    for n in range(0, cfg.evaluations - 1, 4):
        with pytest.raises(KeyboardInterrupt, match='goes on from there'): go(lambda n=n: len(fitness.asked) > n)
    with pytest.raises(KeyboardInterrupt): go(lambda: True)         # at once: what was measured is not lost
    assert comparable(go(None).history)==comparable(whole.history) and len(fitness.asked)==len(whole.history)


def test_an_error_of_the_fitness_loses_nothing(tmp_path):
    space, bin = made()
    asked = []
    def loss(sub):
        asked.append(sub.key)
        if len(asked)==7: raise RuntimeError('out of memory')
        return float(len(sub.embd))
    with pytest.raises(RuntimeError, match='out of memory'): evolve(space, bin, MadeUp(loss), cfg, tmp_path, **quiet)
    result = evolve(space, bin, MadeUp(loss), cfg, tmp_path, **quiet)
    assert len(asked)==len(result.history) + 1 and result.history==read_lines(tmp_path/'history.jsonl')


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_candidate_without_a_loss_is_never_the_best(tmp_path, bad):
    space, bin = made()
    fitness = MadeUp(lambda s: bad if len(s.layers)==2 else len(s.embd) + len(s.layers)/10)
    result = evolve(space, bin, fitness, cfg, tmp_path, **quiet)
    losses = [h['loss'] for h in result.history]
    assert any(not math.isfinite(o) for o in losses) and result.best.loss==min(o for o in losses if math.isfinite(o))
    parents = {h['key'] for h in result.history if not math.isfinite(h['loss'])} & {p for h in result.history for p in h['parents']}
    assert not parents
    again = evolve(space, bin, fitness, cfg, tmp_path, **quiet)
    assert json.dumps(again.history)==json.dumps(result.history)


def test_the_history_tells_everything(tmp_path):
    result = searched(tmp_path, tmp_path/'log')
    space, bin = made()
    seen = {}
    for h in result.history:
        sub = Subnet.from_json(h['subnet'])
        assert sub.key==h['key'] and sub.sizes==h['sizes'] and space.supernet.count(sub)==h['parameters'] in bin and sub in space
        assert h['flops']==32 * space.supernet.flops(sub, 16) and h['tokens']==32
        assert h['loss']==pytest.approx(mean_loss(space.supernet.extract(sub), windows()), abs=1e-5)
        assert len(h['parents'])==dict(given=0, sample=0, immigrant=0, mutate=1, crossover=2)[h['origin']]
        for p in h['parents']:                                      # parents were among the best before this generation
            earlier = sorted(o['loss'] for o in seen.values() if o['generation'] < h['generation'])
            assert seen[p]['loss'] <= earlier[cfg.elites - 1]
        seen[h['key']] = h
    assert result.account==dict(evaluations=len(seen), **{k: pytest.approx(sum(h[k] for h in seen.values())) for k in ('tokens', 'flops', 'seconds')})


@pytest.mark.parametrize('change', ['seed', 'bin', 'windows', 'teacher', 'method', 'space'])
def test_another_search_in_the_folder_is_refused(tmp_path, change):
    searched(tmp_path, tmp_path/'log')
    before = (tmp_path/'history.jsonl').read_text()
    space, bin = made(num_attention_heads=8) if change=='teacher' else made()
    fitness = Fitness(space.supernet, windows()[:, :16] if change=='windows' else windows())
    if change=='bin': bin = ParamBin(bin.low, bin.high - 1)
    if change=='space': space = SearchSpace(space.supernet, 'coarse-uniform', round_to=steps)
    other = SearchConfig(**{**cfg.__dict__, 'seed': 6}) if change=='seed' else cfg
    with pytest.raises(ValueError, match='holds another search'):
        if change=='method': random_search(space, bin, fitness, 5, out=tmp_path, **quiet)
        else: evolve(space, bin, fitness, other, tmp_path, first=[space.one_shot(bin)], **quiet)
    assert (tmp_path/'history.jsonl').read_text()==before


def test_random_search_is_a_sequence_of_which_longer_ones_begin_alike():
    space, bin = made()
    short, long = (random_search(space, bin, MadeUp(lambda s: len(s.embd)), n, seed=3, **quiet).history for n in (5, 12))
    assert comparable(long[:5])==comparable(short) and len(long)==12
    other = random_search(space, bin, MadeUp(lambda s: len(s.embd)), 5, seed=4, **quiet).history
    assert [h['key'] for h in other]!=[h['key'] for h in short]


def test_the_global_random_state_has_no_say_and_is_left_alone():
    space, bin = made()
    histories = []
    for seed in 1, 2:
        random.seed(seed), torch.manual_seed(seed)
        before = random.getstate(), torch.random.get_rng_state().tolist()
        histories.append(comparable(evolve(space, bin, Fitness(space.supernet, windows()), cfg, **quiet).history))
        assert (random.getstate(), torch.random.get_rng_state().tolist())==before
    assert histories[0]==histories[1]


@pytest.mark.parametrize('kw,message', [
    (dict(population=0, elites=0), '`population` is 0'), (dict(elites=0), '`elites` is 0'), (dict(generations=-1), '`generations` is -1'),
    (dict(mutate=-1), '`mutate` is -1'), (dict(mutate=0, crossover=0, immigrants=0), 'a generation has no children')])
def test_impossible_settings(kw, message):
    with pytest.raises(ValueError, match=message): SearchConfig(**kw)


def test_no_evaluations_are_refused():
    space, bin = made()
    with pytest.raises(ValueError, match='`evaluations` is 0'): random_search(space, bin, MadeUp(lambda s: 1.), 0, **quiet)
    assert len(evolve(space, bin, MadeUp(lambda s: 1.), SearchConfig(population=1, elites=1, generations=0), **quiet).history)==1
