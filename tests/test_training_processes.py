"""What `pretrain` promises, kept by real processes: killed at any moment, out of space, told to stop, hung; one process or several, sharded or not.
Each life of a run is a process of its own, forked from a server that has imported everything. A random test names the seed it drew."""
import contextlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, write_tokens
from hypothesis import HealthCheck, given, settings, strategies as st

from slm_begin.data import Batches, Tokens, document_positions, held_out, read_lines
from slm_begin.distill import CrossEntropy
from slm_begin.pretrain import SCHEDULES, Stopped, TrainConfig, cpu_attention, fast_attention, kept_memory, pretrain
from slm_begin.supernet import token_losses

pytestmark = pytest.mark.usefixtures('one_thread')


def config(steps=60, **kw):
    "A run of `steps` steps of 4 windows of 16 tokens, a checkpoint after every third."
    kw = dict(seq_len=16, batch_size=4, lr=1e-2, warmup_steps=3, evals=4, precision='fp32', checkpoint_every='3 steps', seed=1) | kw
    return TrainConfig(tokens=steps * kw['seq_len'] * kw['batch_size'], **kw)

def student(seed=0, **kw): return tiny_model(num_hidden_layers=2, hidden_size=16, noise=0, seed=seed, **kw)

def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])

def comparable(metrics):
    return [{k: v for k, v in m.items() if k not in ('seconds', 'tokens_per_second', 'memory_gb', 'seconds_left')} for m in metrics]

def checkpoints(out): return sorted(f.name for f in out.glob('checkpoints/step-*') if f.suffix != '.tmp')

def lines(out): return len(read_lines(out / 'metrics.jsonl'))


def life(folder, out, result, cfg, how):
    """One life of a run. What it had at its end is in `result` (.pt); what stopped it, in `result` (.txt). `how`: pace (seconds between steps), seed (of the
    weights), model (changes of it), valid (windows), bytes (no file of the first process may be larger), wait (seconds for another process), fsdp."""
    k = int(os.environ.get('RANK', 0))
    if 'bytes' in how and k == 0: resource.setrlimit(resource.RLIMIT_FSIZE, (how['bytes'],) * 2)
    if 'wait' in how: torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=how['wait']))
    tokens, said, model = Tokens(folder), [], student(how.get('seed', 0), **how.get('model', {}))
    batches, valid = Batches(tokens, cfg.seq_len, cfg.batch_size, cfg.seed), held_out(tokens, cfg.seq_len, how.get('valid', 4))
    torch.manual_seed(0)                                                # of dropout
    try:
        metrics = pretrain(model, batches, cfg, out, CrossEntropy(), valid, say=said.append, stop=lambda: time.sleep(how.get('pace', 0)))
        torch.save((weights(model), comparable(metrics), said), f'{result}.{k}.pt')
    except BaseException as e:
        with open(f'{result}.{k}.txt', 'w') as f: f.write(f'{type(e).__name__}: {e}')
        raise
    finally:
        if torch.distributed.is_initialized() and sys.exc_info()[0] is None: torch.distributed.destroy_process_group()

FSDP = dict(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2')


class Runs:
    "Lives of runs on the same text; none outlives its test."
    def __init__(self, processes, tokens, folder): self.processes, self.tokens, self.folder, self.started = processes, tokens, folder, []

    def start(self, cfg, out='run', n=1, result='r', **how):
        "The processes of one life."
        for f in self.folder.glob(f'{result}.*'): f.unlink()
        env = [{}] if n == 1 else group(n)
        if how.get('fsdp'): env = [e | FSDP for e in env]
        life_of = [self.processes(life, self.tokens.folder, self.folder / out, self.folder / result, cfg, how, env=e) for e in env]
        self.started += life_of
        return life_of

    def ended(self, life, seconds=60):
        "Exit codes; a process that does not end fails the test."
        until = time.monotonic() + seconds
        for p in life: p.join(max(0, until - time.monotonic()))
        assert all(p.exitcode is not None for p in life), f"still running after {seconds} s: {life}; {self.said()}"
        return [p.exitcode for p in life]

    def said(self, result='r'): return [f.read_text() for f in sorted(self.folder.glob(f'{result}.*.txt'))]

    def whole(self, cfg, out='run', n=1, result='r', **how):
        "A life to the end of the run: (weights, metrics, what was said) of each process."
        assert self.ended(self.start(cfg, out, n, result, **how)) == [0] * n, self.said(result)
        return [torch.load(self.folder / f'{result}.{k}.pt', weights_only=True) for k in range(n)]

    def kill(self):
        for p in self.started:
            if p.is_alive(): p.kill()
        for p in self.started: p.join()

def group(n):
    "Environments of n processes that speak through gloo, on a free port."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    return [dict(WORLD_SIZE=str(n), RANK=str(k), LOCAL_RANK=str(k), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port),
                 ACCELERATE_USE_CPU='true', GLOO_SOCKET_IFNAME='lo', OMP_NUM_THREADS='1') for k in range(n)]


@pytest.fixture(scope='module')
def tokens(tmp_path_factory): return write_tokens(tmp_path_factory.mktemp('tokens') / 't', 700)     # 43 windows: an epoch ends in its 11th step

@pytest.fixture
def runs(processes, tokens, tmp_path):
    made = Runs(processes, tokens, tmp_path)
    yield made
    made.kill()

@pytest.fixture
def rng():
    seed = random.randrange(10**6)
    print(f"seed {seed}")                                               # pytest shows it when the test fails
    return random.Random(seed)


# Killed

def inodes(files):
    found = set()
    for f in files:
        with contextlib.suppress(FileNotFoundError): found.add(f.stat().st_ino)
    return found

def die_at_random(life, out, rng, at_most=8):
    "Kill one of the processes after some lines more, or while it saves; was a checkpoint half-written then?"
    begun, more, saving = lines(out), rng.randint(0, at_most), rng.random() < .4
    until, before = time.monotonic() + 30, inodes(out.glob('checkpoints/*.tmp'))
    half = lambda: bool(inodes(out.glob('checkpoints/*.tmp')) - before)     # not one that an earlier life left
    while (not half() if saving else lines(out) < begun + more) and all(p.is_alive() for p in life) and time.monotonic() < until: time.sleep(.0005)
    time.sleep(rng.random() * .01)
    victim = rng.choice(life)
    victim.kill()
    victim.join()
    return half()

@pytest.mark.slow
def test_killed_twenty_times_it_ends_bit_identical(runs, rng, tmp_path):
    cfg = config(120)
    (whole, metrics, _), = runs.whole(cfg, 'whole')
    half_written = 0
    for i in range(20):
        life = runs.start(cfg, pace=.004, seed=i if checkpoints(tmp_path / 'run') else 0)   # other weights: all must come from the folder
        half_written += die_at_random(life, tmp_path / 'run', rng)
        assert runs.ended(life) == [-signal.SIGKILL], "the run was over before it was killed 20 times"
        print(f"life {i}: {lines(tmp_path / 'run')} lines, {checkpoints(tmp_path / 'run')}")
    assert half_written, "no life ended while a checkpoint was written"
    (end, again, said), = runs.whole(cfg, seed=99)
    assert said[0].startswith('resumed at step') and torch.equal(end, whole) and again == metrics
    assert not [*tmp_path.glob('run/**/*.tmp')], "half-written files were left behind"


@pytest.mark.slow
def test_one_of_two_processes_killed_again_and_again(runs, rng, tmp_path):
    "The other one ends by itself, also when it is still waiting for the first to come, and what the two left goes on."
    cfg = config(36)
    (whole, metrics, _), _ = runs.whole(cfg, 'whole', n=2)
    for i in range(6):
        life = runs.start(cfg, n=2, pace=.004, wait=5)
        die_at_random(life, tmp_path / 'run', rng, at_most=6)
        codes = runs.ended(life)
        assert -signal.SIGKILL in codes and 0 not in codes, f"life {i}: {codes}"
        print(f"life {i}: {lines(tmp_path / 'run')} lines, {checkpoints(tmp_path / 'run')}, {codes}, {runs.said()}")
    (end, again, said), (other, _, silent) = runs.whole(cfg, n=2, seed=99)
    assert said[0].startswith('resumed at step') and not silent and torch.equal(end, other)
    assert torch.equal(end, whole) and again == metrics

@pytest.mark.slow
def test_one_of_two_processes_hangs(runs, tmp_path):
    "As when a machine is lost without a word: the other one waits as long as it was told to, says which process it waited for, and ends."
    life = runs.start(config(1000), n=2, pace=.01, wait=4)
    wait_for_lines(life, tmp_path / 'run', 8)
    os.kill(life[1].pid, signal.SIGSTOP)
    life[0].join(300)
    assert life[0].exitcode == 1 and runs.said()


# Told to stop

def wait_for_lines(life, out, n):
    until = time.monotonic() + 30
    while lines(out) < n:
        assert time.monotonic() < until and all(p.is_alive() for p in life), f"{lines(out)} lines, {life}"
        time.sleep(.002)

@pytest.mark.parametrize('n', [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize('how', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_and_the_next_start_goes_on(runs, rng, tmp_path, how, n):
    cfg = config(60, checkpoint_every='')
    (whole, metrics, _), *_ = runs.whole(cfg, 'whole', n)
    life = runs.start(cfg, n=n, pace=.005)
    wait_for_lines(life, tmp_path / 'run', rng.randint(2, 30))
    for p in life: os.kill(p.pid, how)                                  # as launchers and schedulers do
    codes, said = runs.ended(life), runs.said()
    assert all(s.startswith('Stopped: stopped at step') for s in said) and len(set(said)) == 1 and len(said) == n, said
    assert set(codes) == {1}, codes                                     # a script that does not catch `Stopped` has not succeeded
    step = int(said[0].split()[4])
    assert checkpoints(tmp_path / 'run') == [f'step-{step:06}']
    (end, again, said), *_ = runs.whole(cfg, n=n)
    assert said[0] == f'resumed at step {step} of 60' and torch.equal(end, whole) and again == metrics


# Damaged, and out of space

def newest(out): return max((f for f in (out / 'checkpoints').rglob('*') if f.is_file() and f.name != 'progress.json'), key=lambda f: f.stat().st_mtime_ns)

@pytest.mark.parametrize('n', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_newest_file_cut_in_half(runs, tmp_path, n):
    cfg = config(21)
    (whole, metrics, _), *_ = runs.whole(cfg, 'whole', n)
    life = runs.start(cfg, n=n, pace=.02)
    wait_for_lines(life, tmp_path / 'run', 12)
    for p in life: p.kill()
    runs.ended(life)
    last = checkpoints(tmp_path / 'run')[-1]
    files = sorted((tmp_path / 'run' / 'checkpoints' / last).rglob('*'), key=lambda f: f.stat().st_mtime_ns)
    cut = files[-2]                                                     # the last but progress.json, which has its own test
    os.truncate(cut, cut.stat().st_size // 2)
    (end, again, said), *_ = runs.whole(cfg, n=n, seed=7)
    assert f'{last} is damaged ({cut.name} is not as it was written); falling back' in said[0] and said[1].startswith('resumed at step')
    assert torch.equal(end, whole) and again == metrics

def test_no_room_for_a_checkpoint(runs, tmp_path):
    "No file may grow beyond some size: what the system itself says when a disk or a quota is full. The checkpoint before is kept, nothing half-written stays."
    cfg = config(21)
    (whole, metrics, _), = runs.whole(cfg, 'whole')
    life = runs.start(cfg, pace=.02)
    wait_for_lines(life, tmp_path / 'run', 6)
    life[0].kill()
    runs.ended(life)
    before = checkpoints(tmp_path / 'run')
    for size in 4_000, 40_000, 10**7:                                   # too small for the model, for the optimizer, for neither
        life = runs.start(cfg, bytes=size)
        codes = runs.ended(life)
        said = runs.said()
        if codes == [0]: break
        assert codes == [1] and 'cannot write the checkpoint' in said[0] and 'Earlier ones are kept' in said[0], said
        assert checkpoints(tmp_path / 'run') == before and not [*tmp_path.glob('run/checkpoints/*.tmp')]
    else: pytest.fail("the run should have had room at the end")
    end, again, _ = torch.load(tmp_path / 'r.0.pt', weights_only=True)
    assert size > 4_000 and torch.equal(end, whole) and again == metrics

@pytest.mark.slow
@pytest.mark.parametrize('fsdp', [False, True])
def test_no_room_for_the_first_of_two_processes(runs, tmp_path, fsdp):
    "The other one learns of it: both say so and end, and the run goes on from where it was."
    cfg = config(9)
    (whole, metrics, _), *_ = runs.whole(cfg, 'whole', n=2, fsdp=fsdp)
    life = runs.start(cfg, n=2, bytes=20_000, wait=20, fsdp=fsdp)
    assert runs.ended(life) == [1, 1] and all('cannot write the checkpoint' in s for s in runs.said()) and len(runs.said()) == 2, runs.said()
    assert not checkpoints(tmp_path / 'run') and not [*tmp_path.glob('run/checkpoints/*.tmp')]
    (end, again, _), *_ = runs.whole(cfg, n=2, fsdp=fsdp)
    assert torch.equal(end, whole) and again == metrics

def test_no_room_for_a_line(runs, tmp_path):
    "The file of metrics may not grow: the run ends, and goes on when there is room."
    cfg = config(21)
    (whole, metrics, _), = runs.whole(cfg, 'whole')
    life = runs.start(replace(cfg, checkpoint_every=''), bytes=2_000)
    assert runs.ended(life) == [1] and runs.said()[0].startswith('OSError'), runs.said()
    (end, again, _), = runs.whole(cfg)
    assert torch.equal(end, whole) and again == metrics


# Longer than six digits

def test_more_than_a_million_steps(runs, tmp_path):
    "Checkpoints are found and pruned whatever the length of their step's number. (The million steps are said to have been done.)"
    cfg = config(1_000_006, checkpoint_every='2 steps', schedule='constant')
    life = runs.start(cfg, pace=.01)
    wait_for_lines(life, tmp_path / 'run', 6)
    life[0].kill()
    runs.ended(life)
    folder = tmp_path / 'run' / 'checkpoints'
    for old in checkpoints(tmp_path / 'run')[:-1]: shutil.rmtree(folder / old)
    last = folder / checkpoints(tmp_path / 'run')[0]
    progress = json.loads((last / 'progress.json').read_text())
    (last / 'progress.json').write_text(json.dumps(progress | dict(step=999_996)))
    last.rename(folder / 'step-999996')
    for step in 1_000_001, 1_000_004:                                   # told to stop at steps of seven digits
        life = runs.start(cfg, pace=.01)
        until = time.monotonic() + 30
        while max((int(c[5:]) for c in checkpoints(tmp_path / 'run')), default=0) < step - 1 and time.monotonic() < until: time.sleep(.002)
        life[0].kill()
        runs.ended(life)
    (_, metrics, said), = runs.whole(cfg)
    assert int(said[0].split()[3]) > 1_000_000, said[0]
    assert len(checkpoints(tmp_path / 'run')) == 2 and (folder / 'step-1000006').exists()


# The same, however many share the work

def near(a, b, tolerance=1e-2): return (a - b).abs().max() < tolerance

@pytest.mark.slow
def test_the_number_of_processes_may_change(runs, rng, tmp_path):
    "1, then 2, then 4, then 1 process: to rounding as one process alone, and as DDP or sharded."
    cfg = config(24)
    (whole, metrics, _), = runs.whole(cfg, 'whole')
    for n in 1, 2, 4:
        life = runs.start(cfg, n=n, pace=.02)
        wait_for_lines(life, tmp_path / 'run', max(1, lines(tmp_path / 'run')) + 6)
        rng.choice(life).kill()
        runs.ended(life)
    (end, again, said), = runs.whole(cfg)
    assert said[0].startswith('resumed at step') and near(end, whole)
    for m, w in zip(again, metrics, strict=True): assert m == {k: pytest.approx(v, abs=5e-3) for k, v in w.items()}

@pytest.mark.slow
@pytest.mark.parametrize('n,changes', [
    (2, dict(batch_size=3, micro_batch_size=1)), (3, dict(batch_size=5, micro_batch_size=2, ema=.9)),
    (2, dict(batch_size=5, optimizer='muon', separate=True)), (4, dict(batch_size=4, short_len=4, gradient_checkpointing=True))])
def test_however_the_batch_is_divided(runs, n, changes):
    "Also where the processes' shares differ, in windows and in micro-batches."
    cfg = config(10, **changes)
    (alone, metrics, _), = runs.whole(replace(cfg, micro_batch_size=8), 'alone')
    shared = runs.whole(cfg, n=n)
    assert all(torch.equal(w, shared[0][0]) for w, *_ in shared) and near(shared[0][0], alone)
    for m, w in zip(shared[0][1], metrics, strict=True): assert m == {k: pytest.approx(v, abs=5e-3, rel=5e-3) for k, v in w.items()}

@pytest.mark.slow
def test_sharded_over_two_processes(runs, tmp_path):
    "FSDP2: to rounding as one process; killed and gone on, bit-identical; the model that is left is whole."
    cfg = config(18)
    (alone, metrics, _), = runs.whole(cfg, 'alone')
    (whole, sharded, _), *_ = runs.whole(cfg, 'whole', n=2, fsdp=True)
    assert whole.shape == alone.shape and near(whole, alone)
    for m, w in zip(sharded, metrics, strict=True): assert m == {k: pytest.approx(v, abs=5e-3) for k, v in w.items()}
    life = runs.start(cfg, n=2, pace=.02, wait=5, fsdp=True)
    wait_for_lines(life, tmp_path / 'run', 8)
    life[1].kill()
    runs.ended(life)
    (end, again, said), *_ = runs.whole(cfg, n=2, seed=9, fsdp=True)
    assert said[0].startswith('resumed at step') and torch.equal(end, whole) and again == sharded

@pytest.mark.slow
@pytest.mark.parametrize('valid', [1, 3])
def test_fewer_windows_to_validate_on_than_processes(runs, valid):
    cfg = config(6)
    (_, alone, _), = runs.whole(cfg, 'whole', valid=valid)
    for _, metrics, _ in runs.whole(cfg, n=4, valid=valid):
        assert [m['valid_loss'] for m in metrics if 'valid_loss' in m] == [pytest.approx(m['valid_loss'], abs=1e-3) for m in alone if 'valid_loss' in m]


def watched(folder, out, result, cfg, how):
    "A life that notes which files it opened for writing, made, renamed or removed."
    touched = set()
    def note(event, args):
        changes = event in ('os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.truncate')
        writes = event == 'open' and isinstance(args[1], str) and {*args[1]} & {*'wxa+'}
        if (changes or writes) and str(out) in str(args[0]): touched.add(os.path.relpath(args[0], out))
    sys.addaudithook(note)
    life(folder, out, result, cfg, how)
    with open(f"{result}.{os.environ['RANK']}.json", 'w') as f: json.dump(sorted(touched), f)

def test_only_the_first_process_writes(runs, tokens, tmp_path):
    "But for what is only its own: the state of its random numbers."
    started = [runs.processes(watched, tokens.folder, tmp_path / 'run', tmp_path / 'r', config(6), {}, env=e) for e in group(2)]
    runs.started += started
    assert runs.ended(started) == [0, 0], runs.said()
    first, second = (json.loads((tmp_path / f'r.{k}.json').read_text()) for k in range(2))
    assert 'metrics.jsonl' in first and 'checkpoints/step-000003.tmp/progress.json.tmp' in first
    assert not [f for f in second if f not in ('.', 'checkpoints', 'checkpoints/step-000003.tmp', 'checkpoints/step-000006.tmp')], second


# Memory

def pages(result):
    "Pages that the system hands out for 20 large tensors, one after the other: as usual, while memory is kept, and then the size of what is kept afterwards."
    def faults(n=20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(n): torch.ones(2**24)                            # 64 MB
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    resident = lambda: int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') // 2**20
    usual, before = faults(), resident()
    with kept_memory():
        faults(1)
        kept, during = faults(), resident()
    Path(result).write_text(json.dumps([usual, kept, during - before, resident() - before]))

@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason="only glibc is told how to keep memory")
def test_memory_is_kept_while_training_and_given_back(runs, tmp_path):
    life = [runs.processes(pages, tmp_path / 'pages.json')]
    assert runs.ended(life) == [0]
    usual, kept, more, afterwards = json.loads((tmp_path / 'pages.json').read_text())
    assert kept < usual / 10 and more >= 60 and afterwards < 32, (usual, kept, more, afterwards)


# Any run, stopped anywhere

@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_run_goes_on_from_any_step(tokens, tmp_path, data):
    "Steps, windows, batches, micro-batches, schedules: stopped at every step in turn and begun again with other weights, the end is bit-identical."
    draw = lambda *choices: data.draw(st.sampled_from(choices))
    seq_len, batch_size = draw(4, 8, 16, 33), draw(1, 2, 3, 7)
    cfg = config(data.draw(st.integers(1, 7)), seq_len=seq_len, batch_size=batch_size, micro_batch_size=draw(1, 2, 5, 8), schedule=draw(*SCHEDULES),
                 evals=draw(1, 2, 5), optimizer=draw('adamw', 'muon'), ema=draw(0., .9), separate=draw(False, True), gradient_checkpointing=draw(False, True),
                 warmup_steps=draw(0, 2, 9), grad_clip=draw(0., .3, 1.), short_len=0 if seq_len % 4 else draw(0, 4), precision=draw('fp32', 'bf16'),
                 checkpoint_every=draw('', '1 step', '2 steps', '40 tokens'), seed=draw(0, 5))
    batches, valid, out = Batches(tokens, seq_len, batch_size, cfg.seed), held_out(tokens, seq_len, 2), Path(tempfile.mkdtemp(dir=tmp_path))
    def go(model, where, stop=None):
        metrics = pretrain(model, batches, cfg, out / where, valid=valid, say=lambda line: None, stop=stop)
        return weights(model), comparable(metrics)
    whole, metrics = go(student(), 'whole')
    for step in range(1, cfg.steps):
        with pytest.raises(Stopped, match=f'stopped at step {step} of {cfg.steps}'): go(student(seed=step - 1), 'parts', lambda: True)
    end, again = go(student(seed=max(0, cfg.steps - 1)), 'parts')
    assert torch.equal(end, whole) and again == metrics


# Attention on CPUs

def visible(n, t, positions): # (n, 1, t, t) bool
    "Which keys each query sees: no later ones, and where `positions` begin at 0 again, none of another document."
    seen = torch.ones(t, t, dtype=torch.bool).tril().expand(n, 1, t, t)
    if positions is None: return seen
    documents = (positions == 0).cumsum(1)
    return seen & (documents[:, None, :, None] == documents[:, None, None, :])

def by_definition(q, k, v, scaling, positions):
    "Softmax attention in float64."
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return ((q @ k.mT) * scaling).masked_fill(~visible(len(q), q.shape[2], positions), -torch.inf).softmax(-1) @ v

@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('separate', [False, True])
@pytest.mark.parametrize('t', [2, 65, 256])
@pytest.mark.parametrize('scale', [1., 8.])                             # flat attention, and nearly one-hot
def test_attention_errs_no_more_than_sdpa(t, scale, separate, autocast):
    "Values and gradients in float32 and under bf16 autocast, also within documents, against float64: at most a little worse than PyTorch's own."
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    torch.manual_seed(0)
    layer = torch.nn.Module()
    layer.is_causal, layer.num_key_value_groups = True, 2
    q, k, v = (scale**.5 * torch.randn(2, h, t, 16) for h in (4, 2, 2))
    upstream = torch.randn(2, 4, t, 16)
    positions = document_positions(torch.randint(9, (2, t)), 0) if separate else None
    mask = visible(2, t, positions) if separate else None
    def values_and_gradients(attend):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        return [out, *torch.autograd.grad((out.double() * upstream).sum(), leaves)]
    truth = values_and_gradients(lambda *x: by_definition(*x, 16**-.5, positions))
    def errors(f):
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            got = values_and_gradients(lambda q, k, v: f(layer, q, k, v, mask, scaling=16**-.5)[0].transpose(1, 2))
        return torch.tensor([((a - b).norm() / b.norm()).item() for a, b in zip(got, truth, strict=True)])
    ours, theirs = errors(cpu_attention), errors(sdpa_attention_forward)
    assert (ours < (.03 if autocast else 1e-5)).all() and (ours < 2 * theirs + (1e-3 if autocast else 1e-6)).all(), (ours, theirs)

def test_documents_do_not_see_each_other():
    "The losses of a window of several documents are those of the documents alone, on a CPU with our attention; without `separate` they are not."
    model, cpu = student().eval(), torch.device('cpu')
    ids = torch.tensor([[0, *range(5, 25), 0, *range(40, 51), 0, 0, *range(60, 67), 9]])        # 0 closes a document, and so begins the next one
    starts = [i for i, t in enumerate(ids[0, :-1]) if t == 0] + [ids.shape[1] - 1]
    with fast_attention(model, cpu), torch.no_grad():
        packed = token_losses(model, ids, positions=document_positions(ids[:, :-1], 0))[0]
        alone = torch.cat([token_losses(model, ids[:, a:b + 1])[0] for a, b in zip(starts, starts[1:])])
        mixed = token_losses(model, ids)[0]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    assert (mixed - alone).abs().max() > 1e-3
