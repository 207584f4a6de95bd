"pretrain: sharded, averaged, with Muon, within documents, tracked; what goes wrong, what is said then, and how it goes on."
import json
import math
import os
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model, write_tokens
from test_pretrain import assert_same, batches, cfg, checkpoints, comparable, go, interrupted, stop_after, student, together, weights

from slm_begin import pretrain as module
from slm_begin.data import read_lines
from slm_begin.distill import CrossEntropy, Distill
from slm_begin.pretrain import Diverged, Every, Stopped, TrainConfig, hidden_matrices, parameter_groups
from slm_begin.supernet import load_model, mean_loss

pytestmark = pytest.mark.usefixtures('one_thread')
ten = replace(cfg, tokens=10*64)


@pytest.fixture(scope='module')
def tokens(tmp_path_factory): return write_tokens(tmp_path_factory.mktemp('tokens')/'t', 700)

@pytest.fixture(scope='module')
def whole(tokens, tmp_path_factory):
    "An uninterrupted run of 24 steps: its weights and metrics."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    model, metrics = go(tokens, tmp_path_factory.mktemp('runs')/'whole')
    torch.set_num_threads(before)
    return weights(model), comparable(metrics)

def near(metrics, others):
    for m,w in zip(comparable(metrics), comparable(others), strict=True): assert {k: pytest.approx(v, abs=2e-3, rel=2e-3) for k,v in w.items()}==m


# How often

@pytest.mark.parametrize('text', ['0 steps', '1.5 steps', '-3 steps', '10', 'steps', '5 apples', '1.2.3 M tokens', 5, '10 T tokens'])
def test_what_is_not_an_interval(text):
    with pytest.raises(ValueError, match="`sample_every` is .*; write such as '200 steps', '10 M tokens' or '15 minutes', or '' for never"):
        TrainConfig(sample_every=text)


@pytest.mark.parametrize('text,size', [('7 steps', 7 * 4096), ('1 step', 4096), ('10 k tokens', 10_000), ('1.5k tokens', 1500), ('0.1 M tokens', 100_000)])
def test_it_is_due_once_in_every_interval(text, size):
    "After the step in which the count of tokens passes a multiple."
    got = [s for s in range(1, 200) if Every(text).due(s, 4096)]
    assert got==[s for s in range(1, 200) if any(m % size==0 for m in range((s - 1) * 4096 + 1, s * 4096 + 1))]
    assert not any(Every('').due(s, 4096) for s in range(1, 200))


def test_evaluations_and_samples_by_steps_tokens_and_minutes(tokens, tmp_path, monkeypatch, whole):
    "The clock is made to run a minute a step; what is trained does not depend on any of it."
    clock = iter(range(0, 10**6, 60))
    monkeypatch.setattr(module.time, 'monotonic', lambda: next(clock))
    def sample(model): return [dict(prompt='a', text='b', training=model.training, noise=torch.rand(1).item())]
    c = replace(cfg, evals=1, eval_every='500 tokens', sample_every='7 steps', checkpoint_every='10 minutes', keep=9)
    model, metrics = go(tokens, tmp_path, c, sample=sample)
    assert [m['step'] for m in metrics if 'valid_loss' in m]==[0, 8, 16, 24]
    assert checkpoints(tmp_path)==['step-000010', 'step-000020', 'step-000024']
    wrote = read_lines(tmp_path/'samples.jsonl')
    assert [(w['step'], w['tokens']) for w in wrote]==[(7, 448), (14, 896), (21, 1344), (24, 1536)]
    assert {(w['prompt'], w['text'], w['training']) for w in wrote}=={('a', 'b', False)}
    assert torch.equal(weights(model), whole[0])


def test_samples_after_the_checkpoint_come_again(tokens, tmp_path):
    kw = dict(cfg=replace(cfg, sample_every='2 steps'), sample=lambda model: [dict(text=str(mean_loss(model, batches(tokens)[0])))])
    go(tokens, tmp_path/'whole', **kw)
    with pytest.raises(Stopped): go(tokens, tmp_path/'run', stop=stop_after(8), **kw)
    shutil.rmtree(tmp_path/'run'/'checkpoints'/'step-000008')
    go(tokens, tmp_path/'run', **kw)
    assert read_lines(tmp_path/'run'/'samples.jsonl')==read_lines(tmp_path/'whole'/'samples.jsonl')


def test_the_newest_and_the_best_are_kept(tokens, tmp_path):
    model, metrics = go(tokens, tmp_path, replace(cfg, lr=.3, keep=3, keep_best=True, eval_every='1 step', spike=0.))
    assert checkpoints(tmp_path)==['step-000015', 'step-000020', 'step-000024']
    best = min((m for m in metrics if 'valid_loss' in m), key=lambda m: m['valid_loss'])
    said = json.loads((tmp_path/'best'/'best.json').read_text())
    assert said=={k: best[k] for k in ('step', 'tokens', 'valid_loss')} and 0 < best['step'] < 24         # at such a rate the last is not the best
    assert mean_loss(load_model(tmp_path/'best'), batches(tokens)[0])==pytest.approx(best['valid_loss'], abs=1e-5)
    assert not (tmp_path/'best.tmp').exists()


# Muon, averages, less memory

def test_muon_is_for_the_matrices_inside_the_layers(tokens, tmp_path):
    "As a loop with torch's own optimizers does it."
    c = replace(cfg, optimizer='muon', grad_clip=0.)
    model, _ = go(tokens, tmp_path, c)
    ref, b = student().train(), batches(tokens)
    inside = hidden_matrices(ref)
    assert {n.split('.')[-2] for n, p in ref.named_parameters() if any(p is m for m in inside)}=={'query_key_value', 'dense', 'dense_h_to_4h', 'dense_4h_to_h'}
    muon = torch.optim.Muon(inside, weight_decay=c.weight_decay, adjust_lr_fn='match_rms_adamw')
    adamw = torch.optim.AdamW(parameter_groups([p for p in ref.parameters() if not any(p is m for m in inside)], c.weight_decay), betas=(c.beta1, c.beta2))
    for step in range(24):
        ref(input_ids=b[step], labels=b[step]).loss.backward()
        for opt in muon, adamw:
            for g in opt.param_groups: g['lr'] = c.lr_at(step)
            opt.step()
            opt.zero_grad()
    assert (weights(model) - weights(ref)).norm() < .05 * (weights(student()) - weights(ref)).norm()      # its products are in bf16


@pytest.mark.parametrize('change', [dict(optimizer='muon'), dict(ema=.8), dict(ema=.8, separate=True, gradient_checkpointing=True), dict(schedule='linear')])
def test_stopped_and_resumed_it_is_bit_identical(tokens, tmp_path, change):
    c = replace(ten, keep_best=True, **change)
    model, metrics = go(tokens, tmp_path/'whole', c)
    for n,seed in (3, 0), (4, 4):
        with pytest.raises(Stopped): go(tokens, tmp_path/'run', c, student(seed=seed), stop=stop_after(n))
    assert_same(go(tokens, tmp_path/'run', c, student(seed=9)), (weights(model), comparable(metrics)))
    assert_same(go(tokens, tmp_path/'run', c, student(seed=8)), (weights(model), comparable(metrics)))    # a finished run gives its model again
    assert (tmp_path/'run'/'best'/'best.json').read_bytes()==(tmp_path/'whole'/'best'/'best.json').read_bytes()


def test_the_average_is_what_is_evaluated_and_kept(tokens, tmp_path):
    seen, raw = [], student()
    go(tokens, tmp_path/'raw', model=raw, stop=lambda: seen.append(weights(raw)))
    model, metrics = go(tokens, tmp_path/'ema', replace(cfg, ema=.7))
    average = weights(student())
    for w in [*seen, weights(raw)]: average = .7 * average + .3 * w
    assert (weights(model) - average).abs().max() < 1e-5 and not torch.equal(weights(model), weights(raw))
    last = [m for m in metrics if 'valid_loss' in m][-1]['valid_loss']
    assert last==pytest.approx(mean_loss(model, batches(tokens)[0]), abs=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(tokens, tmp_path, whole):
    calls = []
    model = student()
    inner = model.gpt_neox.layers[0].attention.forward
    model.gpt_neox.layers[0].attention.forward = lambda *a, **kw: calls.append(1) or inner(*a, **kw)
    got = go(tokens, tmp_path, replace(cfg, gradient_checkpointing=True, evals=1), model)
    assert torch.equal(weights(got[0]), whole[0]) and len(calls)==24 * 2 + 2 + 2      # twice a step; evaluations; how logits are made
    assert not model.gpt_neox.layers[0].gradient_checkpointing


# Documents

def test_attention_stays_within_documents(tmp_path):
    "The loss of packed windows is that of their documents one by one, in training and in evaluation."
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 128, (700,), generator=rng)
    ids[torch.randperm(700, generator=rng)[:90]] = 0                    # the end-of-text token
    tokens = write_tokens(tmp_path/'t', ids=ids.numpy())
    model, valid = student(), batches(tokens)[0]
    sums, n = 0., 0
    for row in valid:
        starts = [0, *[i for i in range(1, 16) if row[i]==0], 16]
        for a,b in zip(starts, starts[1:]):
            sums, n = sums + torch.nn.functional.cross_entropy(model(input_ids=row[None, a:b]).logits[0], row[a+1:b+1], reduction='sum').item(), n + b - a
    _, metrics = go(tokens, tmp_path/'run', replace(ten, tokens=64, separate=True), model)
    assert metrics[0]['valid_loss']==pytest.approx(sums/n, abs=1e-4) and metrics[1]['ce']==pytest.approx(sums/n, abs=1e-4) and n==64
    _, mixed = go(tokens, tmp_path/'mixed', replace(ten, tokens=64))
    assert abs(mixed[0]['valid_loss'] - sums/n) > 1e-3


def test_attention_within_documents_is_fast_on_cpus(tokens, tmp_path, monkeypatch):
    "Yes-or-no masks do not fall back to sdpa."
    from transformers.integrations import sdpa_attention
    monkeypatch.setattr(sdpa_attention, 'sdpa_attention_forward', lambda *a, **kw: pytest.fail("fell back to sdpa"))
    go(tokens, tmp_path, replace(ten, tokens=64, separate=True))


# What cannot work

@pytest.mark.parametrize('c,kw,message', [
    (dict(keep_best=True), dict(valid=None), '`keep_best` needs evaluations'), (dict(sample_every='5 steps'), {}, '`sample_every` needs `sample`'),
    (dict(), dict(valid=torch.zeros(0, 17, dtype=torch.long)), r'`valid` has the shape \(0, 17\); it must hold at least one window'),
    (dict(), dict(valid=torch.zeros(3, 1, dtype=torch.long)), r'`valid` has the shape \(3, 1\)')])
def test_refused_before_anything_is_done(tokens, tmp_path, c, kw, message):
    with pytest.raises(ValueError, match=message): go(tokens, tmp_path/'run', replace(cfg, **c), **kw)
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('kw,message', [(dict(ema=1.), '`ema` is 1.0'), (dict(spike=-1.), '`spike` is -1'), (dict(keep=0), '`keep` is 0'),
    (dict(optimizer='sgd'), "'sgd'; choose one of adamw, muon"),
    (dict(trackers=['mlflow']), "`trackers` names 'mlflow'; choose from tensorboard"),
    (dict(out_of_memory='go'), "'go'; choose one of stop, auto")])
def test_impossible_settings(kw, message):
    with pytest.raises(ValueError, match=message): TrainConfig(**kw)


def test_a_tracker_that_is_not_installed(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match='`trackers` names wandb, which is not installed: `pip install wandb`'):
        go(tokens, tmp_path, replace(cfg, trackers=['wandb']))


def test_tensorboard_has_all_numbers(tokens, tmp_path):
    pytest.importorskip('tensorboard', reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    c = replace(cfg, trackers=['tensorboard'])
    with pytest.raises(Stopped): go(tokens, tmp_path, c, stop=stop_after(12))
    shutil.rmtree(tmp_path/'checkpoints'/'step-000012')                 # steps 11 and 12 come again, and only once
    _, metrics = go(tokens, tmp_path, c)
    events = EventAccumulator(str(tmp_path/'trackers'))
    events.Reload()
    for k in 'loss', 'valid_loss', 'grad_norm':
        assert [(e.step, pytest.approx(e.value, abs=1e-6)) for e in events.Scalars(k)]==[(m['step'], m[k]) for m in metrics if k in m]


def test_a_folder_that_cannot_be_written(tokens, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='the run folder `.*file/run` cannot be written: .*Give the run a folder that can'): go(tokens, tmp_path/'file'/'run')


def test_a_disk_without_room_for_a_checkpoint(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(OSError, match='a checkpoint needs .* GB, and 0.0 GB are free'): go(tokens, tmp_path)


# Trouble

def test_after_a_loss_that_is_no_number_a_lower_rate_goes_on(tokens, tmp_path, whole):
    class Fragile(CrossEntropy):
        def __call__(self, student, batch, lr_scale=1., **told):
            loss, report = super().__call__(student, batch, **told)
            self.calls = getattr(self, 'calls', 0) + 1
            return loss * (math.nan if self.calls==7 else 1), report
    with pytest.raises(ValueError, match=r'lr \(0.01 there, 0.005 here\)'):
        with pytest.raises(Stopped): go(tokens, tmp_path/'other', stop=stop_after(3))
        go(tokens, tmp_path/'other', replace(cfg, lr=5e-3))             # without trouble it is another run
    with pytest.raises(Diverged, match='from now on this folder takes another `lr`'): go(tokens, tmp_path/'run', objective=Fragile())
    model, metrics = go(tokens, tmp_path/'run', replace(cfg, lr=5e-3, grad_clip=.5))
    rates = [m['lr'] for m in metrics if 'loss' in m]
    assert len(rates)==24 and rates[5]==.01 and rates[6]==.005 and not torch.equal(weights(model), whole[0])
    with pytest.raises(ValueError, match='seed'): go(tokens, tmp_path/'run', replace(cfg, seed=2))
    trouble, = json.loads((tmp_path/'run'/'run.json').read_text())['troubles']
    assert trouble['step']==6 and 'at step 7 the loss is nan' in trouble['what']


class Rising(CrossEntropy):
    "A loss that is reported to rise from a step on."
    def __init__(self, at): super().__init__(), setattr(self, 'at', at)
    def __call__(self, student, batch, progress=0., **told):
        loss, report = super().__call__(student, batch, progress=progress, **told)
        return loss, dict(ce=report['ce'] + 5 * (round(progress * 60) >= self.at))


def test_a_loss_that_rises_stops_the_run_with_its_state_saved(tokens, tmp_path):
    c = replace(cfg, tokens=60*64, warmup_steps=5)
    go(tokens, tmp_path/'warmup', c, objective=Rising(3))               # a start that only the warm-up makes worse is not one
    with pytest.raises(Diverged, match=r'the mean loss of the last 20 steps is [\d.]+ nats above its lowest .*more than `spike` \(2.0\) allows'):
        go(tokens, tmp_path/'run', c, objective=Rising(30))
    at = int(checkpoints(tmp_path/'run')[-1][5:])
    assert 34 < at < 45
    said = []
    _, metrics = go(tokens, tmp_path/'run', c, objective=Rising(30), say=said.append)                     # called again, it goes on regardless
    assert said[0]==f'resumed at step {at} of 60' and [m['step'] for m in metrics if 'loss' in m]==[*range(1, 61)]


def test_the_watch_remembers_what_was_before_a_stop(tokens, tmp_path):
    c, ends = replace(cfg, tokens=60*64, warmup_steps=5), []
    for name,stops in dict(whole=[], parts=[29, 4]).items():
        for n in stops:
            with pytest.raises(Stopped): go(tokens, tmp_path/name, c, objective=Rising(30), stop=stop_after(n))
        with pytest.raises(Diverged): go(tokens, tmp_path/name, c, objective=Rising(30))
        ends.append(checkpoints(tmp_path/name)[-1])
    assert ends[0]==ends[1]


# Memory

class Small(CrossEntropy):
    "As if there were memory for so many windows only."
    def __init__(self, windows, failing=lambda: True): super().__init__(), setattr(self, 'windows', windows), setattr(self, 'failing', failing)
    def __call__(self, student, batch, **told):
        if len(batch) > self.windows and self.failing(): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
        return super().__call__(student, batch, **told)


def test_out_of_memory_proposes_a_smaller_micro_batch(tokens, tmp_path):
    with pytest.raises(MemoryError, match='out of memory at step 1 with `micro_batch_size` 4: take 2. The result will be the same'):
        go(tokens, tmp_path, objective=Small(2))
    with pytest.raises(MemoryError, match='with `micro_batch_size` 1: use `gradient_checkpointing`'):
        go(tokens, tmp_path, replace(cfg, out_of_memory='auto'), objective=Small(0))


def test_out_of_memory_goes_on_with_half(tokens, tmp_path, whole):
    said, auto = [], replace(cfg, out_of_memory='auto')
    model, metrics = go(tokens, tmp_path/'a', auto, objective=Small(1), say=said.append)
    assert said[0]=='out of memory at step 1 with `micro_batch_size` 4: going on with 2; the result is the same' and 'going on with 1' in said[1]
    assert [m['micro_batch_size'] for m in metrics if 'micro_batch_size' in m]==[2, 1]
    assert torch.equal(weights(model), weights(go(tokens, tmp_path/'b', replace(cfg, micro_batch_size=1))[0]))
    late = iter([False] * 6 + [True] + [False] * 99)                    # two passes of the try-out and four steps go well
    model, metrics = go(tokens, tmp_path/'c', auto, objective=Small(3, lambda: next(late)))
    assert [m['step'] for m in metrics if 'micro_batch_size' in m]==[4] and (weights(model) - whole[0]).abs().max() < 1e-2


def test_the_try_out_leaves_no_trace(tokens, tmp_path):
    got = []
    for how in 'stop', 'auto':
        torch.manual_seed(0)
        got.append(weights(go(tokens, tmp_path/how, replace(ten, out_of_memory=how), student(hidden_dropout=.3))[0]))
    assert torch.equal(*got)


# Signals

@pytest.mark.parametrize('sent', [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_that_wants_its_machine_back(processes, tokens, tmp_path, whole, sent):
    p = processes(interrupted, tokens.folder, tmp_path/'run', tmp_path/'result')
    while len(read_lines(tmp_path/'run'/'metrics.jsonl')) < 5 and p.is_alive(): time.sleep(.01)
    for _ in range(2): os.kill(p.pid, sent)                             # some send it more than once
    p.join()
    assert p.exitcode==0 and (tmp_path/'result').read_text().startswith('stopped at step ')
    assert_same(go(tokens, tmp_path/'run'), whole)


# Several processes

SHARDED = dict(ACCELERATE_USE_FSDP='true')

def test_sharded_over_two_processes_it_learns_as_one(processes, tokens, tmp_path):
    "FSDP2 with an average; stopped on the way, resumed; the model at the end holds its whole weights as plain tensors."
    kw = dict(cfg=replace(cfg, ema=.8, keep_best=True, separate=True, gradient_checkpointing=True))
    model, alone = go(tokens, tmp_path/'alone', **kw)
    got = together(processes, 2, tokens.folder, tmp_path/'run', tmp_path/'a', stop_first_rank=7, env=SHARDED, **kw)
    assert got==['Stopped: stopped at step 7 of 24; call again to go on from there'] * 2
    (a, metrics, said), (b, *_) = together(processes, 2, tokens.folder, tmp_path/'run', tmp_path/'b', env=SHARDED, **kw)
    assert said[0]=='resumed at step 7 of 24' and torch.equal(a, b) and (a - weights(model)).abs().max() < 1e-2
    near(metrics, alone)
    best = json.loads((tmp_path/'run'/'best'/'best.json').read_text())
    assert mean_loss(load_model(tmp_path/'run'/'best'), batches(tokens)[0], 8)!=best['valid_loss']          # that of separate documents
    with pytest.raises(ValueError, match='this run is without FSDP, the checkpoints in .* were written with'): go(tokens, tmp_path/'run', **kw)


def test_sharded_what_does_not_work_is_refused(processes, tokens, tmp_path):
    for c,message in (replace(cfg, optimizer='muon'), 'ValueError: `optimizer` is muon, which needs whole matrices'), \
                     (replace(cfg, batch_size=3), 'ValueError: `batch_size` is 3; with FSDP'):
        got = together(processes, 2, tokens.folder, tmp_path/'run', tmp_path/'r', cfg=c, env=SHARDED)
        assert all(g.startswith(message) for g in got)


def test_a_batch_that_does_not_divide(processes, tokens, tmp_path):
    "Three windows a step and two evaluated windows over, on two processes: shares differ, the result does not."
    c = replace(ten, batch_size=3, micro_batch_size=1)
    model, alone = go(tokens, tmp_path/'alone', c, valid=batches(tokens)[0][:3])
    (a, metrics, _), _ = together(processes, 2, tokens.folder, tmp_path/'run', tmp_path/'r', cfg=c, valid=batches(tokens)[0][:3])
    near(metrics, alone)
    assert (a - weights(model)).abs().max() < 1e-2


def only_the_second(): return os.environ['RANK']=='1'

def test_all_processes_agree_on_what_fits(processes, tokens, tmp_path):
    c = replace(ten, out_of_memory='auto')
    (a, metrics, said), (b, *_) = together(processes, 2, tokens.folder, tmp_path/'run', tmp_path/'r', cfg=c, objective=Small(1, only_the_second))
    assert said[0]=='out of memory at step 1 with `micro_batch_size` 2: going on with 1; the result is the same' and torch.equal(a, b)
    assert [m['micro_batch_size'] for m in metrics if 'micro_batch_size' in m]==[1]


def test_sharded_in_bf16_with_a_live_teacher(processes, tokens, tmp_path):
    "Weights in full precision, products in half; the teacher is whole in each process."
    c = replace(ten, precision='bf16')
    _, alone = go(tokens, tmp_path/'alone', c, objective=Distill(student(seed=7)))
    (a, metrics, _), (b, *_) = together(processes, 2, tokens.folder, tmp_path/'run', tmp_path/'r', cfg=c, kd=True, env=SHARDED)
    assert torch.equal(a, b) and a.dtype==torch.float32 and not torch.equal(a, a.bfloat16().float())
    for m,w in zip(metrics, comparable(alone), strict=True): assert {k: pytest.approx(v, abs=.05, rel=.05) for k,v in w.items()}==m


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason="needs a C++ compiler")
def test_sharded_and_compiled_layer_by_layer(processes, tokens, tmp_path):
    c = replace(cfg, tokens=4*64, compile=True)
    _, alone = go(tokens, tmp_path/'alone', replace(c, compile=False), objective=Distill(student(seed=7)))
    (a, metrics, _), (b, *_) = together(processes, 2, tokens.folder, tmp_path/'run', tmp_path/'r', cfg=c, kd=True, env=SHARDED)
    assert torch.equal(a, b)
    near(metrics, alone)


def test_dropout_ties_a_run_to_its_processes(tokens, tmp_path):
    with pytest.raises(Stopped): go(tokens, tmp_path, model=student(hidden_dropout=.3), stop=stop_after(3))
    path = tmp_path/'checkpoints'/'step-000003'/'progress.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'processes': 2}))
    with pytest.raises(ValueError, match=r'trained by 2 processes, and now there are 1: with dropout \(hidden_dropout\)'):
        go(tokens, tmp_path, model=student(hidden_dropout=.3))


# What is reported

def test_what_is_reported(tokens, tmp_path):
    said = []
    _, metrics = go(tokens, tmp_path, flops=lambda window: 1e6 * window, say=said.append)
    for m in metrics:
        if 'loss' not in m: continue
        assert m['perplexity']==pytest.approx(math.exp(m['ce']), rel=1e-3) and m['memory_gb'] > .05 and m['mfu'] > 0 and m['seconds_left'] >= 0
        assert m['mfu']==pytest.approx(16e6 * m['tokens_per_second'] / module.peak_flops(torch.device('cpu'), False)[0], rel=.02)
    for word in 'loss', 'perplexity', 'lr', 'gradient', 'tokens/s', 'MFU', 'GB', 'left': assert word in said[-1]


def test_the_teacher_is_given_back(tokens):
    teacher = student(seed=7)
    objective = Distill(teacher)
    with module.placed(objective, torch.device('meta'), True) as placed:
        assert objective.teacher is placed is not teacher and placed.dtype==torch.bfloat16 and placed.device.type=='meta'
    assert objective.teacher is teacher and teacher.dtype==torch.float32 and teacher.device.type=='cpu'


def test_peaks_of_known_gpus(monkeypatch):
    for name,peak in {'NVIDIA H100 80GB HBM3': 989, 'NVIDIA H100 PCIe': 756, 'NVIDIA A100-SXM4-80GB': 312, 'NVIDIA L40S': 362, 'NVIDIA L4': 121}.items():
        module.peak_flops.cache_clear()
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device, name=name: name)
        assert module.peak_flops(torch.device('cuda'), True)[0]==peak * 1e12
    module.peak_flops.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason="needs a C++ compiler")
def test_every_model_of_a_process_is_compiled(monkeypatch):
    "Not only the first four, after which torch would go on without a word, and without compiling; the same shape once."
    compiler, compiled_graphs = torch.compile, []
    def backend(graph, inputs):
        compiled_graphs.append(1)
        return graph.forward
    monkeypatch.setattr(torch, 'compile', lambda f, **kw: compiler(f, backend=backend, **kw))
    torch._dynamo.reset()
    ids, counts = torch.zeros(2, 16, dtype=torch.long), []
    for width in [*range(48, 88, 8), 48]:
        before, model = len(compiled_graphs), tiny_model(num_hidden_layers=1, intermediate_size=width)
        with module.compiled(model, torch.device('cpu')):
            model(ids).logits.sum().backward()
            with torch.no_grad(): model(ids)
        counts.append(len(compiled_graphs) - before)
    assert counts == [2] * 5 + [0]
