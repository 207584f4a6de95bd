"""What a search is worth, measured on the embedded teacher, for the chapter `search`: `python tools/study_search.py NAME` writes nbs/results/search-NAME.json.

`methods`   evolution against its baselines at equal FLOPs, ten seeds (3 minutes on two cores)
`spaces`    four granularities at equal FLOPs, and each finer one begun with the elites of the coarser, ten seeds (8 minutes)
`orders`    importance against prefix against random order, ten seeds (3 minutes)
`racing`    the same searches read in full and raced at several confidences, ten seeds (10 minutes)
`proxy`     32 sub-networks of one bin, trained alike: what tells who is best afterwards? (70 minutes)
`rerank`    the search's own choice against that of re-ranking, trained alike, three seeds (12 minutes)

Losses that were measured once are kept in runs/study-search; a run that was stopped goes on from there.
"""
import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from slm_begin.data import Batches, append_line, held_out, prepare, read_lines
from slm_begin.distill import CrossEntropy, Distill
from slm_begin.fitness import Fitness
from slm_begin.importance import Importance, measure, orders
from slm_begin.pipeline import environment
from slm_begin.pretrain import TrainConfig, pretrain
from slm_begin.search import Budget, SearchConfig, coarse_to_fine, rerank, search
from slm_begin.space import GRANULARITIES, ParamBin, SearchSpace
from slm_begin.supernet import Subnet, Supernet, mean_loss

root = Path(__file__).parent.parent
results, runs = root/'nbs'/'results', root/'runs'/'study-search'
seeds, budget = range(10), Budget(flops=3e11)                            # about 100 to 150 candidates, raced
train = TrainConfig(tokens=409_600, seq_len=256, batch_size=8, micro_batch_size=8, lr=2e-3, schedule='wsd', warmup_steps=8, decay=.3, evals=9,
                    checkpoint_every='')                                 # as in the demo
quiet = dict(say=lambda line: None)


class Lab:
    "The embedded teacher, its texts, and a bin of 30 %, as in the demo."
    def __init__(self):
        self.net = Supernet.from_pretrained()
        self.tokens = {role: prepare('embedded', role, self.net.tokenizer, runs/'data'/role, **quiet) for role in ('train', 'calib', 'valid')}
        self.calib, self.valid = held_out(self.tokens['calib'], 256, 16), held_out(self.tokens['valid'], 256, 32)
        self.bin, self.fitness = ParamBin.around(self.net.count(self.net.full), .3, .04), Fitness(self.net, self.calib)

    def space(self, granularity='coarse-layerwise', kind='importance', seed=0):
        path = runs/'importance.safetensors'
        if kind == 'importance' and not path.exists(): measure(self.net, self.calib).save(path)
        order = orders(kind, self.net, Importance.load(path) if kind == 'importance' else None, seed)
        return SearchSpace(self.net, granularity, orders_=order)

    def search(self, space, seed=0, **kw):
        kw = dict(budget=budget, first=[space.one_shot(self.bin)]) | kw
        return search(space, self.bin, self.fitness, seed=seed, scores=runs/'scores', **kw, **quiet)

    def trained(self, sub, name, cfg, objective, valid):
        "The model, and its learning curve on `valid`; the folder keeps what is finished."
        model, batches = self.net.extract(sub), Batches(self.tokens['train'], cfg.seq_len, cfg.batch_size, cfg.seed)
        metrics = pretrain(model, batches, cfg, runs/'arms'/f'{sub.key}-{name}', objective, valid, **quiet)
        return model, [(m['tokens'], m['valid_loss']) for m in metrics if 'valid_loss' in m]


def summary(r) -> dict:
    "What is kept of a search: its end, its cost, and how the best loss fell."
    falls = [h for h, before in zip(r.history, [None, *r.history]) if before is None or h['best'] != before['best']]
    account = {k: v for k, v in r.account.items() if k != 'peak_memory_gb'}
    return dict(loss=r.best.loss, parameters=r.best.parameters, sizes=r.best.subnet.sizes, account=account,
                curve=[(h['total_tokens'], h['total_flops'], h['best']) for h in falls])

def many(lab, name, space, **kw):
    "The summaries of ten seeds; `space` may be a function of the seed."
    found = [summary(lab.search(space(seed) if callable(space) else space, seed, **kw)) for seed in seeds]
    losses = [f['loss'] for f in found]
    tokens, flops = (sum(f['account'][k] for f in found) / len(found) for k in ('tokens', 'flops'))
    print(f"{name:34} {sum(losses) / len(losses):.4f}, {min(losses):.4f} to {max(losses):.4f}; {tokens / 1e3:,.0f} k tokens, {flops:.2e} FLOPs", flush=True)
    return found


def methods(lab):
    space = lambda m: lab.space(kind='identity' if m == 'first-layers' else 'importance')
    return {m: many(lab, m, space(m), method=m) for m in ('one-shot', 'first-layers', 'random', 'local', 'tpe', 'evolve')}

def spaces(lab):
    return {g: many(lab, g, lab.space(g)) for g in GRANULARITIES} | dict(zip(('in thirds', 'a third more'), (in_thirds(lab), a_third_more(lab))))

def in_thirds(lab):
    "Per seed: three spaces, each for a third of the FLOPs, begun with the elites of the one before."
    out = []
    for seed in seeds:
        steps = [lab.space(g) for g in ('coarse-uniform', 'coarse-layerwise', 'fine-layerwise')]
        cfg = SearchConfig(seed=seed, budget=Budget(flops=budget.flops / len(steps)))
        out.append([summary(r) for r in coarse_to_fine(steps, lab.bin, lab.fitness, cfg, first=[steps[0].one_shot(lab.bin)], scores=runs/'scores', **quiet)])
        print('in thirds', seed, [f['loss'] for f in out[-1]], flush=True)
    return out

def a_third_more(lab):
    "Per seed: the coarse search of full length, then a fine one for a third more, begun with its elites."
    out = []
    for seed in seeds:
        steps, cfg = [lab.space(g) for g in ('coarse-layerwise', 'fine-layerwise')], SearchConfig(seed=seed, budget=budget)
        cfgs = [cfg, replace(cfg, budget=Budget(flops=budget.flops / 3))]
        found = coarse_to_fine(steps, lab.bin, lab.fitness, cfgs, first=[steps[0].one_shot(lab.bin)], scores=runs/'scores', **quiet)
        out.append([summary(r) for r in found])
        print('a third more', seed, [f['loss'] for f in out[-1]], flush=True)
    return out

def by_order(lab):
    return {k: many(lab, k, lambda seed, k=k: lab.space(kind=k, seed=seed)) for k in ('importance', 'identity', 'random')}

def racing(lab):
    "A hundred candidates each, whatever they cost."
    space, out = lab.space(), {}
    for method in 'random', 'evolve':
        for confidence in 1, .99, .9, .8:
            out[f'{method} {confidence}'] = many(lab, f'{method} {confidence}', space, method=method, confidence=confidence, budget=Budget(evaluations=100))
    return out

def proxy(lab):
    "Trains the sub-networks that the committed file names, and keeps their learning curves."
    path, lines = results/'search-proxy.json', runs/'proxy.jsonl'
    known = {r['key'] for r in read_lines(lines)}
    for row in json.loads(path.read_text(encoding='utf-8'))['result']:
        sub = Subnet.from_json(row['subnet'])
        if sub.key in known: continue
        kd = []
        for tokens in 20_480, 40_960, 81_920:                               # each with a schedule of its own
            model, _ = lab.trained(sub, f'kd{tokens}', replace(train, tokens=tokens, warmup_steps=2, evals=1), Distill(lab.net.model), None)
            kd.append((tokens, mean_loss(model, lab.calib)))
        _, curve = lab.trained(sub, 'ce', train, CrossEntropy(), lab.valid)
        append_line(lines, dict(key=sub.key, before=lab.fitness(sub), kd=kd, curve=curve, parameters=lab.net.count(sub), flops=lab.net.flops(sub, 256),
                                sizes=sub.sizes, subnet=sub.to_json()))
    return read_lines(lines)

def reranking(lab):
    "Per seed: the finalists of a search with niches, what a short training says of them, and what the two choices become."
    out, space = [], lab.space()
    floor = .75 * mean_loss(lab.net.model, lab.valid)
    def shortly(sub, steps=32):
        cfg = replace(train, tokens=steps * 2048, schedule='constant', warmup_steps=8, evals=6)
        model, curve = lab.trained(sub, 'short', cfg, CrossEntropy(), lab.calib)
        tokens = cfg.tokens + len(curve) * lab.calib[:, 1:].numel()
        return curve, dict(tokens=tokens, flops=3 * cfg.tokens * lab.net.flops(sub, 256) + (tokens - cfg.tokens) * lab.net.flops(sub, 256), seconds=0)
    for seed in range(3):
        plain = lab.search(space, seed)
        found = lab.search(space, seed, niches=6, finalists=6, population=24, elites=6, first=space.one_shots(lab.bin))
        ranked = rerank(found.finalists, shortly, train.tokens, floor=floor, say=print)
        rows = {'one-shot': space.one_shot(lab.bin), 'least loss before': plain.best.subnet, 're-ranked': ranked[0].candidate.subnet}
        ends = {name: lab.trained(sub, f'ce{seed}', replace(train, seed=seed), CrossEntropy(), lab.valid)[1] for name, sub in rows.items()}
        print(seed, {name: round(c[-1][1], 4) for name, c in ends.items()}, flush=True)
        arms = {n: dict(sizes=s.sizes, before=lab.fitness(s), curve=ends[n], flops=lab.net.flops(s, 256)) for n, s in rows.items()}
        out.append(dict(seed=seed, arms=arms,
                        finalists=[dict(before=t.candidate.loss, curve=t.curve, predicted=t.predicted, sizes=t.candidate.subnet.sizes, **t.account)
                                   for t in ranked],
                        search=dict(plain=plain.account, niches=found.account)))
    return out


if __name__ == '__main__':
    studies = dict(methods=methods, spaces=spaces, orders=by_order, racing=racing, proxy=proxy, rerank=reranking)
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=studies)
    name = p.parse_args().what
    torch.set_num_threads(2)
    data = dict(command=f'python tools/study_search.py {name}', environment=environment(), result=studies[name](Lab()))
    (results/f'search-{name}.json').write_text(json.dumps(data) + '\n', encoding='utf-8')
