"pretrain: killed at any moment, damaged, interrupted, on several processes, on a full disk; and that it is the loop that it says it is."
import json
import math
import os
import pickle
import resource
import shutil
import signal
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, write_tokens

from slm_begin import pretrain as module
from slm_begin.data import Batches, Tokens, read_lines
from slm_begin.distill import CrossEntropy, Distill
from slm_begin.pretrain import Diverged, Pretraining, Stopped, TrainConfig, parameter_groups, pretrain
from slm_begin.supernet import precision_of

cfg = TrainConfig(tokens=24*4*16, seq_len=16, batch_size=4, lr=1e-2, warmup_steps=3, evals=4, precision='fp32', checkpoint_every='5 steps', seed=1)
quiet = dict(say=lambda line: None)


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def tokens(tmp_path_factory): return write_tokens(tmp_path_factory.mktemp('tokens')/'t', 700)     # 43 windows: an epoch ends in its 11th step


def student(**kw): return tiny_model(num_hidden_layers=2, hidden_size=16, noise=0, **kw)

def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])

def batches(tokens, cfg=cfg): return Batches(tokens, cfg.seq_len, cfg.batch_size, cfg.seed)

def go(tokens, out, cfg=cfg, model=None, **kw):
    "Train a model that is the same each time; the model and the metrics."
    model = model or student()
    kw = {**quiet, 'valid': batches(tokens)[0], **kw}
    return model, pretrain(model, batches(tokens, cfg), cfg, out, **kw)

MEASURED = 'seconds', 'tokens_per_second', 'memory_gb', 'seconds_left', 'mfu'

def comparable(metrics): return [{k:v for k,v in m.items() if k not in MEASURED} for m in metrics]

def checkpoints(out): return sorted(f.name for f in (Path(out)/'checkpoints').iterdir())

def stop_after(n):
    calls = iter(range(1, 10**6))
    return lambda: next(calls)==n


@pytest.fixture(scope='module')
def whole(tokens, tmp_path_factory):
    "An uninterrupted run: its weights and metrics."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    model, metrics = go(tokens, tmp_path_factory.mktemp('runs')/'whole')
    torch.set_num_threads(before)
    return weights(model), comparable(metrics)

def assert_same(got, whole):
    model, metrics = got
    assert torch.equal(weights(model), whole[0]) and comparable(metrics)==whole[1]


# Killed

def trained(folder, out, die_at=None, moment='after a step', result=None, **kw):
    "A run in a process of its own, which kills itself with SIGKILL at a step."
    run = []
    def die(*args, **kw): os.kill(os.getpid(), signal.SIGKILL)
    at = lambda: die_at is not None and run and run[0].step==die_at
    first, log, save = Pretraining.resume, Pretraining.log, Pretraining.save
    def resume(self):
        run.append(self)
        return first(self)
    def half_a_line(self, **values):
        if not at(): return log(self, **values)
        with open(self.out/'metrics.jsonl', 'a') as f: f.write('{"step": 1')
        die()
    def dying_save(self):
        if at(): module.write_json, module.os.replace = {'while saving': die, 'before renaming': module.write_json}[moment], die
        return save(self)
    Pretraining.resume = resume
    if moment=='in a line': Pretraining.log = half_a_line
    if moment in ('while saving', 'before renaming'): Pretraining.save = dying_save
    if moment=='before renaming': module.write_json = lambda path, data: Path(path).write_text(json.dumps(data))
    objective = Distill(student(seed=7)) if kw.pop('kd', False) else None
    torch.manual_seed(0)                                            # of dropout
    model, metrics = go(Tokens(folder), out, stop=lambda: at() and moment=='after a step' and die(), objective=objective, model=student(**kw))
    if result: torch.save((weights(model), comparable(metrics)), result)


def test_kill_9_and_resume_ends_bit_identical(processes, tokens, tmp_path, whole):
    for die_at,moment in [(2, 'after a step'), (5, 'while saving'), (10, 'before renaming'), (13, 'in a line'), (24, 'while saving')]:
        p = processes(trained, tokens.folder, tmp_path/'run', die_at, moment)
        p.join()
        assert p.exitcode==-signal.SIGKILL, (die_at, moment)
    assert_same(go(tokens, tmp_path/'run', model=student(seed=3)), whole)       # another model: all must come from the checkpoint
    assert checkpoints(tmp_path/'run')==['step-000020', 'step-000024']


def test_killed_with_dropout_and_a_teacher(processes, tokens, tmp_path):
    "The state of the random numbers is a part of the checkpoint."
    kw = dict(hidden_dropout=.3, attention_dropout=.1, kd=True)
    for out,deaths in dict(whole=[None], parts=[12, None]).items():
        for die_at in deaths:
            p = processes(_trained_kd, tokens.folder, tmp_path/out, die_at, tmp_path/f'{out}.pt', kw)
            p.join()
            assert p.exitcode==(0 if die_at is None else -signal.SIGKILL)
    (a, metrics), (b, again) = (torch.load(tmp_path/f'{o}.pt', weights_only=True) for o in ('whole', 'parts'))
    assert torch.equal(a, b) and metrics==again

def _trained_kd(folder, out, die_at, result, kw): trained(folder, out, die_at, result=result, **kw)


def interrupted(folder, out, result):
    try: go(Tokens(folder), out, stop=lambda: time.sleep(.05), say=lambda line: (out.parent/'said').write_text(line))
    except Stopped as e: result.write_text(str(e))


def test_sigint_saves_and_exits_resumable(processes, tokens, tmp_path, whole):
    p = processes(interrupted, tokens.folder, tmp_path/'run', tmp_path/'result')
    while len(read_lines(tmp_path/'run'/'metrics.jsonl')) < 5 and p.is_alive(): time.sleep(.01)
    os.kill(p.pid, signal.SIGINT)
    p.join()
    message = (tmp_path/'result').read_text()
    step = int(message.split()[3])
    assert p.exitcode==0 and message==f'stopped at step {step} of 24; call again to go on from there' and 3 <= step < 24
    assert (tmp_path/'said').read_text()=='stopping: saving a checkpoint (press Ctrl-C again to stop at once)'
    assert checkpoints(tmp_path/'run')[-1]==f'step-{step:06}'
    said = []
    assert_same(go(tokens, tmp_path/'run', say=said.append), whole)
    assert said[0]==f'resumed at step {step} of 24'


def test_pressed_twice_it_stops_at_once(tokens, tmp_path, whole):
    handler = signal.getsignal(signal.SIGINT)
    def twice():
        for _ in range(2): os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as e: go(tokens, tmp_path/'run', stop=twice)
    assert not isinstance(e.value, Stopped) and signal.getsignal(signal.SIGINT) is handler
    assert_same(go(tokens, tmp_path/'run'), whole)


def test_pressed_in_the_last_step_it_is_not_lost(tokens, tmp_path, whole):
    press = lambda line: line.startswith('step    24/24') and os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Stopped, match='stopped at step 24 of 24'): go(tokens, tmp_path/'run', say=press)
    assert_same(go(tokens, tmp_path/'run'), whole)


def test_stopped_again_and_again(tokens, tmp_path, whole):
    for step in range(1, 24):
        with pytest.raises(Stopped, match=f'stopped at step {step} of 24'): go(tokens, tmp_path/'run', stop=stop_after(1))
    assert_same(go(tokens, tmp_path/'run'), whole)
    calls = []
    assert_same(go(tokens, tmp_path/'run', stop=lambda: calls.append(1)), whole)    # finished: nothing is trained
    assert not calls


def test_a_run_in_a_thread(tokens, tmp_path, whole):
    "As notebooks have it, where Ctrl-C belongs to the kernel."
    got = []
    t = threading.Thread(target=lambda: got.append(go(tokens, tmp_path/'run')))
    t.start(), t.join()
    assert_same(got[0], whole)


# Damaged

def flip(path, at=-100):
    data = bytearray(path.read_bytes())
    data[at] ^= 255
    path.write_bytes(data)

damages = {
    'model cut short': lambda c: (c/'model.safetensors').write_bytes((c/'model.safetensors').read_bytes()[:-1]),
    'a flipped bit in the optimizer': lambda c: flip(c/'optimizer.bin'),
    'random state missing': lambda c: (c/'random_states_0.pkl').unlink(),
    'no progress.json': lambda c: (c/'progress.json').unlink(),
    'progress.json is empty': lambda c: (c/'progress.json').write_text(''),
    'progress.json is garbage': lambda c: (c/'progress.json').write_bytes(b'\xff\xfe\x00garbage'),
    'progress.json is something else': lambda c: (c/'progress.json').write_text('[1]'),
    'everything missing': lambda c: (shutil.rmtree(c), c.mkdir())}


@pytest.fixture(scope='module')
def half(tokens, tmp_path_factory):
    "A run that was stopped at step 12, with checkpoints at 10 and 12."
    out = tmp_path_factory.mktemp('runs')/'half'
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.raises(Stopped): go(tokens, out, stop=stop_after(12))
    torch.set_num_threads(before)
    return out


@pytest.mark.parametrize('damage', damages)
def test_a_damaged_checkpoint_falls_back_and_ends_the_same(tokens, tmp_path, whole, half, damage):
    shutil.copytree(half, out := tmp_path/'run')
    assert checkpoints(out)==['step-000010', 'step-000012']
    damages[damage](out/'checkpoints'/'step-000012')
    said = []
    assert_same(go(tokens, out, say=said.append), whole)
    assert 'step-000012 is damaged (' in said[0] and said[0].endswith('); falling back to the one before') and said[1]=='resumed at step 10 of 24'


def test_all_damaged_starts_anew_and_says_so(tokens, tmp_path, whole, half):
    shutil.copytree(half, out := tmp_path/'run')
    for c in checkpoints(out): flip(out/'checkpoints'/c/'model.safetensors')
    said = []
    with pytest.raises(Stopped): go(tokens, out, say=said.append, stop=stop_after(6))
    assert 'step-000012 is damaged' in said[0] and 'step-000010 is damaged' in said[1] and said[2]=='no sound checkpoint is left: training starts anew'
    assert checkpoints(out)==['step-000005', 'step-000006']         # damaged ones do not count among the newest
    assert_same(go(tokens, out), whole)


# A full disk

def test_a_full_disk_keeps_the_checkpoint_before(tokens, tmp_path, whole, monkeypatch):
    from accelerate import Accelerator
    save_state, calls = Accelerator.save_state, iter(range(10))
    def full(self, folder):
        save_state(self, folder)
        if next(calls)==1: raise OSError(28, 'No space left on device')
    message = 'cannot write the checkpoint `.*step-000010`: .*No space left on device. Earlier ones are kept'
    with monkeypatch.context() as m:
        m.setattr(Accelerator, 'save_state', full)
        with pytest.raises(OSError, match=message): go(tokens, tmp_path/'run')
    assert checkpoints(tmp_path/'run')==['step-000005']             # and nothing half-written takes up the space
    assert_same(go(tokens, tmp_path/'run'), whole)


def limited(folder, out, result):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))     # no file may be larger: what the libraries themselves say then
    try: go(Tokens(folder), out)
    except OSError as e: result.write_text(str(e))


def test_a_disk_that_is_really_full(processes, tokens, tmp_path, whole):
    with pytest.raises(Stopped): go(tokens, tmp_path/'run', stop=stop_after(3))
    p = processes(limited, tokens.folder, tmp_path/'run', tmp_path/'result')
    p.join()
    assert p.exitcode==0 and 'cannot write the checkpoint' in (tmp_path/'result').read_text() and checkpoints(tmp_path/'run')==['step-000003']
    assert_same(go(tokens, tmp_path/'run'), whole)


# Numbers that are none

class Bad(CrossEntropy):
    "Cross-entropy that goes wrong at a step."
    def __init__(self, at, how): super().__init__(), setattr(self, 'left', at), setattr(self, 'how', how)
    def __call__(self, student, batch, **told):
        loss, report = super().__call__(student, batch, **told)
        self.left -= 1
        if self.left==0 and self.how=='loss': loss = loss * math.inf
        if self.left==0 and self.how=='gradient': loss = loss + (0 * student.lm_head.weight.sum()).sqrt()
        return loss, report


@pytest.mark.parametrize('how', ['loss', 'gradient'])
@pytest.mark.parametrize('at', [7, 10])
def test_a_loss_that_is_not_finite_raises_with_advice(tokens, tmp_path, whole, at, how):
    message = rf'at step {at} the loss is .*, so the step was not taken. The state after step {at-1} is saved in .*. Lower `lr` or raise `warmup_steps`'
    with pytest.raises(Diverged, match=message): go(tokens, tmp_path/'run', objective=Bad(at, how))
    assert checkpoints(tmp_path/'run')==['step-000005', f'step-{at-1:06}']
    assert_same(go(tokens, tmp_path/'run'), whole)


# It is the loop that it says it is

def plain_loop(tokens, cfg, model):
    "AdamW with warm-up, stable phase and decay, written again from its description."
    b, steps = batches(tokens, cfg), math.ceil(cfg.tokens/(cfg.batch_size * cfg.seq_len))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim==1]
    opt = torch.optim.AdamW([dict(params=matrices, weight_decay=cfg.weight_decay), dict(params=others, weight_decay=0)], betas=(cfg.beta1, cfg.beta2))
    n_decay, norms, losses = round(cfg.decay * steps), [], []
    for step in range(steps):
        lr = cfg.lr * min(1, (step + 1)/cfg.warmup_steps)
        if step >= steps - n_decay: lr = cfg.lr * (1 - (1 - cfg.min_lr) * (step + 1 - (steps - n_decay))/n_decay)
        for g in opt.param_groups: g['lr'] = lr
        loss = model.train()(input_ids=b[step], labels=b[step]).loss
        opt.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip).item())
        opt.step()
        losses.append(loss.item())
    return losses, norms


@pytest.mark.parametrize('change', [dict(), dict(grad_clip=.3, decay=.5, min_lr=0.), dict(tie=True, weight_decay=1.),
                                    dict(tokens=24*64 - 63, beta1=.8, beta2=.99)])
def test_it_is_adamw_with_a_schedule_and_clipping(tokens, tmp_path, change):
    change = dict(change)
    tie = change.pop('tie', False)
    c = replace(cfg, **change)
    model, metrics = go(tokens, tmp_path/'run', c, student(tie=tie))
    ref = student(tie=tie)
    losses, norms = plain_loop(tokens, c, ref)
    steps = [m for m in metrics if 'loss' in m]
    assert [m['step'] for m in steps]==list(range(1, 25)) and [m['tokens'] for m in steps]==[64*i for i in range(1, 25)]
    torch.testing.assert_close(torch.tensor([m['loss'] for m in steps]), torch.tensor(losses), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor([m['grad_norm'] for m in steps]), torch.tensor(norms), rtol=1e-2, atol=1e-3)
    assert c.grad_clip==1 or min(norms) > .3
    moved = (weights(student(tie=tie)) - weights(ref)).norm()
    assert (weights(model) - weights(ref)).norm() < 2e-3 * moved
    assert losses[-1] < losses[0] - .3


def test_evaluations_are_what_they_say(tokens, tmp_path):
    seen, model = [], student()
    def watch(): seen.append((torch.no_grad()(lambda: model(input_ids=valid, labels=valid).loss.item())(), model.training))
    valid = batches(tokens)[3]
    _, metrics = go(tokens, tmp_path/'run', model=model, valid=valid, stop=watch)
    evals = {m['step']: m['valid_loss'] for m in metrics if 'valid_loss' in m}
    assert [*evals]==cfg.eval_steps()==[0, 1, 3, 8, 24] and all(training for _,training in seen) and not model.training
    for step in 1, 3, 8: assert evals[step]==pytest.approx(seen[step-1][0], abs=1e-5)
    assert evals[24]==pytest.approx(model(input_ids=valid, labels=valid).loss.item(), abs=1e-5)


def test_decay_is_for_matrices_only():
    model = student(tie=True)
    decays, not_ = parameter_groups([*model.parameters()], .1)
    assert all(p.ndim==2 for p in decays['params']) and all(p.ndim==1 for p in not_['params']) and (decays['weight_decay'], not_['weight_decay'])==(.1, 0)
    assert len({id(p) for g in (decays, not_) for p in g['params']})==len([*model.parameters()])


@pytest.mark.parametrize('micro', [1, 2, 3])
def test_micro_batches_change_nothing_but_rounding(tokens, tmp_path, whole, micro):
    model, metrics = go(tokens, tmp_path/'run', replace(cfg, micro_batch_size=micro))
    assert (weights(model) - whole[0]).abs().max() < 1e-2 and comparable(metrics)[-1]['valid_loss']==pytest.approx(whole[1][-1]['valid_loss'], abs=2e-3)


def test_precisions_may_alternate_in_one_process(tokens, tmp_path, whole):
    low, metrics = go(tokens, tmp_path/'bf16', replace(cfg, precision='bf16'))
    assert low.dtype==torch.float32 and not torch.equal(weights(low), whole[0])
    assert comparable(metrics)[-1]['valid_loss']==pytest.approx(whole[1][-1]['valid_loss'], abs=.05)
    assert_same(go(tokens, tmp_path/'fp32'), whole)
    assert precision_of('bf16')=='bf16' and precision_of('fp32')=='no' and precision_of() in ('bf16', 'no')


def test_learning_rates():
    for schedule in module.SCHEDULES:
        for steps in 1, 2, 5, 40, 1000:
            for warmup in 0, 1, 7, 2000:
                c = TrainConfig(tokens=steps, seq_len=1, batch_size=1, schedule=schedule, warmup_steps=warmup, lr=.5, min_lr=.1)
                rates = [c.lr_at(s) for s in range(steps)]
                assert len(rates)==c.steps and all(0 < r <= .5 for r in rates)
                top = max(range(steps), key=lambda i: rates[i])     # up, then never up again
                assert rates[:top+1]==sorted(rates[:top+1]) and rates[top:]==sorted(rates[top:], reverse=True)
                if warmup < steps and schedule!='constant' and steps > 2: assert rates[-1]==pytest.approx(.05)
                assert c.eval_steps()[0]==0 and c.eval_steps()[-1]==steps and c.eval_steps()==sorted(set(c.eval_steps()))


# Settings

@pytest.mark.parametrize('kw,message', [
    (dict(tokens=0), '`tokens` is 0'), (dict(batch_size=0), '`batch_size` is 0'), (dict(evals=0), '`evals` is 0'), (dict(lr=0), '`lr` is 0'),
    (dict(lr=math.nan), '`lr` is nan'), (dict(lr=2), '`lr` is 2'), (dict(decay=1.5), '`decay` is 1.5'), (dict(beta2=-.1), '`beta2` is -0.1'),
    (dict(warmup_steps=-1), '`warmup_steps` is -1'), (dict(grad_clip=-1), '`grad_clip` is -1'), (dict(precision='fp16'), "'fp16'; choose one of auto"),
    (dict(schedule='steps'), "`schedule` is 'steps'; choose one of wsd, cosine, linear")])
def test_impossible_settings(kw, message):
    with pytest.raises(ValueError, match=message): TrainConfig(**kw)


@pytest.mark.parametrize('kw,message', [(dict(seq_len=8), r'`seq_len` is 16, but `batches` were made with 8'), (dict(batch_size=2), '`batch_size` is 4'),
                                        (dict(seed=9), '`seed` is 1')])
def test_batches_of_other_settings_are_refused(tokens, tmp_path, kw, message):
    with pytest.raises(ValueError, match=message): pretrain(student(), batches(tokens, replace(cfg, **kw)), cfg, tmp_path/'run')
    assert not (tmp_path/'run').exists()


def test_another_run_in_the_folder_is_refused_and_not_touched(tokens, tmp_path, half):
    shutil.copytree(half, out := tmp_path/'run')
    other = write_tokens(tmp_path/'other', 700, seed=1)
    before = {f: f.read_bytes() for f in out.rglob('*') if f.is_file()}
    def refused(message, t=tokens, **kw):
        with pytest.raises(ValueError, match=f'holds a run with other settings: .*{message}.*Give the run another folder'): go(t, out, **kw)
    refused(r'lr \(0.01 there, 0.02 here\)', cfg=replace(cfg, lr=.02))
    refused(r'seed \(1 there, 2 here\).*seed \(1 there, 2 here\)', cfg=replace(cfg, seed=2))
    refused(r'text \(0+ there, 0+1 here\)', t=other)
    refused(r'objective \(cross-entropy there, distill here\)', objective=Distill(student()))
    refused(r'parameters \(', model=student(intermediate_size=40))
    refused(r'precision \(fp32 there, bf16 here\), precision \(no there, bf16 here\)', cfg=replace(cfg, precision='bf16'))
    assert {f: f.read_bytes() for f in out.rglob('*') if f.is_file()}==before


def test_what_does_not_decide_may_change(tokens, tmp_path, whole, half):
    shutil.copytree(half, out := tmp_path/'run')
    model, _ = go(tokens, out, replace(cfg, checkpoint_every='7 steps', evals=9))
    assert torch.equal(weights(model), whole[0]) and checkpoints(out)==['step-000021', 'step-000024']
    shutil.copytree(half, out := tmp_path/'only at the end')
    go(tokens, out, replace(cfg, checkpoint_every=''))
    assert checkpoints(out)==['step-000012', 'step-000024']


@pytest.mark.parametrize('steps', [15, 40])
def test_wsd_is_replanned_while_stable(tokens, tmp_path, half, steps):
    "As if it had been planned so from the beginning: the stable part is common to all plans."
    shutil.copytree(half, out := tmp_path/'run')
    c = replace(cfg, tokens=steps * 64)
    a, metrics = go(tokens, out, c)
    b, direct = go(tokens, tmp_path/'direct', c)
    assert torch.equal(weights(a), weights(b)) and [m for m in comparable(metrics) if 'loss' in m]==[m for m in comparable(direct) if 'loss' in m]


@pytest.mark.parametrize('c,stop,steps', [(cfg, 21, 40), (cfg, 12, 14), (cfg, 12, 10), (replace(cfg, schedule='cosine'), 12, 40), (cfg, None, 40)],
                         ids=['decaying', 'would decay', 'shorter', 'cosine', 'finished'])
def test_no_replanning_once_it_decays(tokens, tmp_path, c, stop, steps):
    try: go(tokens, tmp_path/'run', c, stop=stop and stop_after(stop))
    except Stopped: pass
    with pytest.raises(ValueError, match=rf'tokens \({24*64} there, {steps*64} here\)'): go(tokens, tmp_path/'run', replace(c, tokens=steps * 64))


# Several processes

def rank(n, k, port): return dict(WORLD_SIZE=str(n), RANK=str(k), LOCAL_RANK=str(k), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port),
                                  ACCELERATE_USE_CPU='true', GLOO_SOCKET_IFNAME='lo', OMP_NUM_THREADS='1')

def member(folder, out, result, k, kw):
    import torch.distributed as dist
    said, kw = [], dict(kw)
    if kw.pop('kd', False): kw['objective'] = Distill(student(seed=7))
    if (n := kw.pop('stop_first_rank', None)) and k==0: kw['stop'] = stop_after(n)
    try: model, metrics = go(Tokens(folder), out, say=said.append, **kw)
    except Exception as e: result.with_suffix(f'.{k}.txt').write_text(f'{type(e).__name__}: {e}')
    except Stopped as e: result.with_suffix(f'.{k}.txt').write_text(f'Stopped: {e}')
    else: torch.save((weights(model), comparable(metrics), said), result.with_suffix(f'.{k}.pt'))
    dist.destroy_process_group()


def together(processes, n, folder, out, result, env=(), **kw):
    "Run in n processes that speak through gloo; what each one said."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    started = [processes(member, folder, out, result, k, kw, env={**rank(n, k, port), **dict(env)}) for k in range(n)]
    for p in started: p.join(300)
    assert [p.exitcode for p in started]==[0] * n, [f.read_text() for f in result.parent.glob('*.txt')]
    texts = [result.with_suffix(f'.{k}.txt') for k in range(n)]
    return [t.read_text() if t.exists() else torch.load(t.with_suffix('.pt'), weights_only=True) for t in texts]


def test_two_processes_learn_as_one(processes, tokens, tmp_path, whole):
    (a, metrics, said), (b, _, silent) = together(processes, 2, tokens.folder, tmp_path/'run', tmp_path/'r')
    assert torch.equal(a, b) and (a - whole[0]).abs().max() < 1e-2 and said and not silent
    assert len(metrics)==len(whole[1])
    for m,w in zip(metrics, whole[1], strict=True): assert {k: pytest.approx(v, abs=2e-3) for k,v in w.items()}==m
    model, _ = go(tokens, tmp_path/'run')                           # one process reads the finished run of two
    assert torch.equal(weights(model), a)


def test_two_processes_stop_together_and_go_on_as_one(processes, tokens, tmp_path, whole):
    "Only the first process is asked to stop; a checkpoint of two is resumed by one, and the other way round."
    got = together(processes, 2, tokens.folder, tmp_path/'run', tmp_path/'a', stop_first_rank=7)
    assert got==['Stopped: stopped at step 7 of 24; call again to go on from there'] * 2 and checkpoints(tmp_path/'run')==['step-000005', 'step-000007']
    with pytest.raises(Stopped): go(tokens, tmp_path/'run', stop=stop_after(5))
    flip(tmp_path/'run'/'checkpoints'/'step-000012'/'model.safetensors')
    (a, _, said), (b, *_) = together(processes, 2, tokens.folder, tmp_path/'run', tmp_path/'b')
    assert 'step-000012 is damaged' in said[0] and said[1]=='resumed at step 10 of 24' and torch.equal(a, b) and (a - whole[0]).abs().max() < 1e-2


def test_two_processes_with_a_teacher(processes, tokens, tmp_path):
    (a, metrics, _), _ = together(processes, 2, tokens.folder, tmp_path/'run', tmp_path/'r', kd=True, cfg=replace(cfg, tokens=10*64, micro_batch_size=1))
    model, alone = go(tokens, tmp_path/'alone', replace(cfg, tokens=10*64), objective=Distill(student(seed=7)))
    assert (weights(model) - a).abs().max() < 1e-2
    for m,w in zip(metrics, comparable(alone), strict=True): assert {k: pytest.approx(v, abs=2e-3) for k,v in w.items()}==m


def test_batches_that_cannot_be_shared_are_refused(processes, tokens, tmp_path):
    got = together(processes, 2, tokens.folder, tmp_path/'run', tmp_path/'r', cfg=replace(cfg, batch_size=1))
    assert got==['ValueError: `batch_size` is 1; each of the 2 processes needs a window: take a larger one, or fewer processes'] * 2


# Safety

def test_nothing_is_unpickled_that_could_run_code():
    for f in Path(module.__file__).parent.glob('*.py'):
        code = f.read_text(encoding='utf-8')
        for word in 'weights_only=False', 'import pickle', 'import joblib', 'import dill', 'allow_pickle=True': assert word not in code, f"{f.name}: {word}"
        for line in code.splitlines(): assert 'torch.load(' not in line or 'weights_only=True' in line, f"{f.name}: {line}"


def leave_a_trace(path): Path(path).write_text('ran')

class Bomb:
    def __init__(self, path): self.path = path
    def __reduce__(self): return leave_a_trace, (str(self.path),)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ['optimizer.bin', 'random_states_0.pkl'])
@pytest.mark.parametrize('write', [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))], ids=['torch', 'pickle'])
def test_a_checkpoint_that_was_made_to_run_code_does_not(tokens, tmp_path, half, name, write):
    shutil.copytree(half, out := tmp_path/'run')
    at = out/'checkpoints'/'step-000012'
    write(Bomb(tmp_path/'ran'), at/name)
    progress = json.loads((at/'progress.json').read_text())         # with the right hash, as whoever made it would
    progress['files'][name] = module._sha(at/name)
    (at/'progress.json').write_text(json.dumps(progress))
    if name=='optimizer.bin':
        with pytest.raises(pickle.UnpicklingError): go(tokens, out)
    else: go(tokens, out)                                           # Accelerate leaves out random states that it cannot read
    assert not (tmp_path/'ran').exists()


# Windows that are short at first, and a compiled body

def test_short_windows_are_the_same_tokens(tokens, tmp_path):
    "The first step of a run with short windows is a step on a batch of twice as many windows, half as long."
    short, half = replace(cfg, tokens=64, short_len=8), replace(cfg, tokens=64, seq_len=8, batch_size=8)
    a, b = student(), student()
    went = pretrain(a, batches(tokens, short), short, tmp_path/'short', **quiet)
    cut = Batches(tokens, 8, 8, shuffle=False)
    whole = batches(tokens, short)[0]
    cut.rows = lambda step, start, stop: torch.cat([whole[:, :9], whole[:, 8:]])
    cut.seed = half.seed
    direct = pretrain(b, cut, half, tmp_path/'half', **quiet)
    assert abs(went[0]['loss'] - direct[0]['loss']) < 1e-6 and (weights(a) - weights(b)).abs().max() < 1e-6

def test_windows_grow_when_they_should():
    c = TrainConfig(tokens=100*4096, short_len=128, short_until=.6)
    assert [c.window_at(i) for i in (0, 59, 60, 99)]==[128, 128, 512, 512] and c.mean_window==round(.6*128 + .4*512)
    assert TrainConfig().mean_window==512
    with pytest.raises(ValueError, match='`short_len` is 100; it must divide `seq_len`'): TrainConfig(short_len=100)

def test_tokens_may_not_be_replanned_once_windows_have_grown(tokens, tmp_path):
    c = replace(cfg, short_len=8, short_until=.3, decay=.1, checkpoint_every='4 steps')
    with pytest.raises(Stopped): go(tokens, tmp_path, c, stop=stop_after(4))
    with pytest.raises(Stopped): go(tokens, tmp_path, replace(c, tokens=2*c.tokens), stop=stop_after(6))      # windows are short in both plans
    with pytest.raises(ValueError, match='tokens'): go(tokens, tmp_path, c)                                   # in this one they would have grown

@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason="needs a C++ compiler")
def test_a_compiled_body_learns_the_same(tokens, tmp_path):
    c = replace(cfg, tokens=5*4*16)
    a, b = (go(tokens, tmp_path/name, run)[0] for name, run in dict(a=c, b=replace(c, compile=True)).items())
    assert (weights(a) - weights(b)).abs().max() < 1e-4
    ids = torch.arange(5)[None]
    assert (a(ids).logits - b(ids).logits).abs().max() < 1e-3        # and is an ordinary model afterwards
    assert b.state_dict().keys()==a.state_dict().keys()

def test_compile_without_a_compiler_is_refused(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, 'which', lambda name: None)
    with pytest.raises(ValueError, match='`compile` needs a C'): go(tokens, tmp_path, replace(cfg, compile=True))

def test_attention_on_a_cpu_is_sdpa(tokens):
    "Values and gradients, with groups of queries; and whatever is not plain causal windows is sdpa itself."
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    layer = torch.nn.Module()
    layer.is_causal, layer.num_key_value_groups = True, 3
    q, k, v = (torch.randn(2, h, 17, 8, requires_grad=True) for h in (6, 2, 2))
    padding = torch.ones(2, 1, 17, 17, dtype=torch.bool).tril()
    for mask, scaling in (None, None), (None, .3), (padding, .3):
        both = [f(layer, q, k, v, mask, scaling=scaling)[0] for f in (module.cpu_attention, sdpa_attention_forward)]
        grads = [torch.autograd.grad(o.sin().sum(), (q, k, v)) for o in both]
        for a, b in zip([both[0], *grads[0]], [both[1], *grads[1]], strict=True): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

def test_the_models_attention_is_given_back(tokens, tmp_path):
    model = student()
    seen = []
    go(tokens, tmp_path, replace(cfg, tokens=64), model, say=lambda line: seen.append(model.config._attn_implementation))
    assert seen and {*seen}=={'cpu_attention'} and model.config._attn_implementation=='sdpa'
