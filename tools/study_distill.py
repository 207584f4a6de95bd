"""What kinds of distillation are worth, measured on the embedded teacher, for the chapters `distill` and `cache`: `python tools/study_distill.py NAME`
writes nbs/results/distill-NAME.json.

`hidden`   distillation with hidden states matched through the student's own indices, and without; three seeds (20 minutes on one core)
`losses`   the five losses to a live teacher; three seeds (15 minutes on one core)
`cached`   live, top-k and sampled distillation: quality after equal steps, bytes a token, seconds; three orders of the same text (10 minutes on one core)

What was trained once is kept in runs/study-distill; a run that was stopped goes on from there.
"""
import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from slm_begin.cache import Cached, cache_teacher
from slm_begin.data import Batches, held_out, prepare
from slm_begin.distill import CrossEntropy, Distill
from slm_begin.importance import Importance, measure, orders
from slm_begin.pipeline import environment
from slm_begin.pretrain import TrainConfig, pretrain
from slm_begin.space import ParamBin, SearchSpace
from slm_begin.supernet import Supernet

root = Path(__file__).parent.parent
results, runs = root/'nbs'/'results', root/'runs'/'study-distill'
train = TrainConfig(tokens=100 * 2048, seq_len=256, batch_size=8, micro_batch_size=8, lr=2e-3, schedule='wsd', warmup_steps=8, decay=.3, evals=4)
quiet = dict(say=lambda line: None)


class Lab:
    "The embedded teacher, its texts, and the one-shot sub-network of the recipe `demo`."
    def __init__(self):
        self.net = Supernet.from_pretrained()
        self.tokens = {role: prepare('embedded', role, self.net.tokenizer, runs/'data'/role, **quiet) for role in ('train', 'calib', 'valid')}
        self.valid, path = held_out(self.tokens['valid'], 256, 64), runs/'importance.safetensors'
        if not path.exists(): measure(self.net, held_out(self.tokens['calib'], 256, 16), **quiet).save(path)
        space = SearchSpace(self.net, 'coarse-layerwise', orders_=orders('importance', self.net, Importance.load(path)))
        self.subnet = space.one_shot(ParamBin.around(self.net.count(self.net.full), .3, .04))

    def trained(self, name, batches, cfg, objective):
        "What an arm becomes: its learning curve, how it ends, and the seconds of its steps. The folder keeps what is finished."
        model = self.net.extract(self.subnet)
        metrics = pretrain(model, batches, cfg, runs/'arms'/f'{name}-{cfg.seed}', objective, self.valid, **quiet)
        evals = [m for m in metrics if 'valid_loss' in m]
        row = dict(name=name, seed=cfg.seed, curve=[(m['tokens'], m['valid_loss']) for m in evals], seconds=evals[-1]['seconds'], **self.judged(model))
        print({k: v if isinstance(v, (str, int)) else round(v, 4) for k, v in row.items() if k != 'curve'}, flush=True)
        return row

    @torch.inference_mode()
    def judged(self, model):
        "On the validation text, of the model as it is now: loss, KL to the teacher, and by how much it is too sure of its first choice."
        total = dict(loss=0., kl=0., too_sure=0.)
        for rows in self.valid.split(8):
            q, p = (m(input_ids=rows[:, :-1], use_cache=False).logits.log_softmax(-1) for m in (model.eval(), self.net.model))
            sure, first = q.exp().max(-1)
            parts = dict(loss=-q.gather(-1, rows[:, 1:, None]), kl=(p.exp() * (p - q)).sum(-1), too_sure=sure - (first == rows[:, 1:]).float())
            for name, part in parts.items(): total[name] += part.mean().item() * len(rows) / len(self.valid)
        return total


KINDS = {f'top-{k}': dict(method='topk', k=k) for k in (4, 16, 64)} | {'50 draws': dict(method='sample', draws=50)}

def cached(lab):
    arms, text = [], prepare('embedded', 'train', lab.net.tokenizer, runs/'data'/'epoch', max_tokens=train.tokens + 1, **quiet)     # an epoch is a run
    of = lambda seed: Batches(text, train.seq_len, train.batch_size, seed)
    caches = {kind: cache_teacher(lab.net.model, of(0), runs/'caches'/kind, **kw, **quiet) for kind, kw in KINDS.items()}           # for every order
    for seed in range(3):
        go = lambda name, objective, seed=seed: lab.trained(name, of(seed), replace(train, seed=seed), objective)
        arms.append(go('cross-entropy', CrossEntropy()))
        for alpha, beta in (.3, .7), (0., 1.):
            objectives = {'live': Distill(lab.net.model, alpha, beta), **{kind: Cached(c, alpha, beta) for kind, c in caches.items()}}
            arms += [go(f'{kind} {alpha}', objective) | dict(kind=kind, alpha=alpha, beta=beta) for kind, objective in objectives.items()]
    made = {kind: dict(bytes_per_token=c.manifest['bytes_per_token'], **c.account) for kind, c in caches.items()}
    return dict(steps=train.steps, tokens=train.tokens, teacher=lab.judged(lab.net.model), arms=arms, caches=made)


HIDDEN = dict(nothing={}) | {f'{kind} {weight}': dict(hidden=weight, hidden_loss=kind) for kind in ('cosine', 'mse') for weight in (.1, 1.)}
KL = {'kl': {}, 'reverse-kl': dict(loss='reverse-kl'), 'js 0.5': dict(loss='js', skew=.5), 'skew-kl 0.1': dict(loss='skew-kl', skew=.1), 'tv': dict(loss='tv')}

def live(lab, settings, seed):
    "An arm with a live teacher, alpha .3 and beta .7. Equal settings are trained once, whatever they are called."
    kw = dict(subnet=lab.subnet) | settings if 'hidden' in settings else settings
    batches = Batches(lab.tokens['train'], train.seq_len, train.batch_size, seed)
    return lab.trained('-'.join(['distill', *map(str, settings.values())]), batches, replace(train, seed=seed), Distill(lab.net.model, .3, .7, **kw))

def of_each(lab, arms):
    made = [live(lab, kw, seed) | dict(name=name) for seed in range(3) for name, kw in arms.items()]
    return dict(tokens=train.tokens, teacher=lab.judged(lab.net.model), arms=made)


if __name__ == '__main__':
    studies = dict(cached=cached, hidden=partial(of_each, arms=HIDDEN), losses=partial(of_each, arms=KL))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=studies)
    name = p.parse_args().what
    data = dict(command=f'python tools/study_distill.py {name}', environment=environment(), result=studies[name](Lab()))
    (results/f'distill-{name}.json').write_text(json.dumps(data) + '\n', encoding='utf-8')
