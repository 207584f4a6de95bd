"""Training on one CUDA GPU: a student of Pythia-410M's shape, alone and with a teacher of Pythia-1.4B's, random weights, bf16, compiled.

    python tools/bench.py gpu                    # every arm in a process of its own, then nbs/results/gpu.json (about 8 minutes)
    python tools/bench.py gpu --arm ce           # one arm; the results of the others stay
    python tools/bench.py gpu --tiny             # all of it with toy sizes, also on a CPU: to see that it runs. Its numbers mean nothing and are not kept

Arms: ce, live, cached (ours: cross-entropy, distillation from a live teacher, from its cached logits); trainer-ce, trainer-live (Hugging Face's Trainer, which
knows no distillation: there the loss is the dense formula that its users write). `mfu` counts the student's forward pass thrice, a live teacher's once, and
attention over the whole window, over the card's dense bf16 peak."""
import argparse
import contextlib
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

ARMS = 'ce', 'live', 'cached', 'trainer-ce', 'trainer-live'
KEPT = Path(__file__).parents[1] / 'nbs' / 'results' / 'gpu.json'
SIZES = dict(student=(1024, 24, 16), teacher=(2048, 24, 16), vocab=50304, seq_len=2048, batch=32, micro=8, warm=4, steps=12)
TINY = dict(student=(32, 2, 4), teacher=(48, 2, 4), vocab=512, seq_len=64, batch=4, micro=2, warm=1, steps=2)

def main(options):
    p = argparse.ArgumentParser(prog='bench.py gpu', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument('--arm', choices=ARMS, help="only this one, in this process")
    p.add_argument('--tiny', action='store_true', help="toy sizes, on whatever device there is")
    p.add_argument('--out', type=Path, help=f"where results are kept (usually {KEPT.relative_to(KEPT.parents[2])}; with --tiny nowhere)")
    given = p.parse_args(options)
    if not torch.cuda.is_available() and not given.tiny: p.error("no CUDA GPU here; --tiny shows that all of it runs, and measures nothing")
    if given.tiny: print("toy sizes: these numbers mean nothing, they only show that everything runs", flush=True)
    out = given.out or (None if given.tiny else KEPT)
    if given.arm: return report(measure(given.arm, TINY if given.tiny else SIZES, given.tiny), out)
    failed = [arm for arm in ARMS if subprocess.run([sys.executable, sys.argv[0], 'gpu', '--arm', arm, *options]).returncode]
    if failed: sys.exit(f"no result of {', '.join(failed)}: see above")

def report(run: dict, out: Path | None):
    "Print what one arm reached; keep it beside the others'. Results of another machine, or of other versions, make way."
    print(json.dumps(run), flush=True)
    if out is None: return
    here = dict(gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None, python=platform.python_version(),
                versions={k: version(k) for k in ('torch', 'transformers', 'accelerate')})
    kept = json.loads(out.read_text(encoding='utf-8')) if out.exists() else {}
    same = all(kept.get(k) == v for k, v in here.items())
    runs = {r['arm']: r for r in (kept['runs'] if same else [])} | {run['arm']: run}
    result = dict(command='python tools/bench.py gpu', date=str(date.today()), **here, runs=[runs[a] for a in ARMS if a in runs])
    out.write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')

# What is measured


def neox(shape, size, device=None):
    "A GPT-NeoX with random weights, on the GPU if there is one."
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    torch.manual_seed(0)
    width, layers, heads = shape
    cfg = GPTNeoXConfig(vocab_size=size['vocab'], hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
                        max_position_embeddings=size['seq_len'], bos_token_id=0, eos_token_id=0)
    with torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu')): return GPTNeoXForCausalLM(cfg)

def flops(shape, size):
    "FLOPs a token of a forward pass."
    from slm_begin.supernet import Supernet
    net = Supernet(neox(shape, size, 'meta'))
    return net.flops(net.full, size['seq_len'])

def text(folder: Path, size):
    "Random tokens, as many as the run reads."
    from dataclasses import asdict

    from slm_begin.data import Batches, Manifest, Tokens
    ids = np.random.default_rng(0).integers(size['vocab'], size=(size['steps'] + 1) * size['batch'] * size['seq_len'] + 1, dtype='uint16')
    folder.mkdir()
    ids.tofile(folder / 'shard-00000.bin')
    manifest = Manifest('random', 'random', 1, len(ids), len(ids), size['vocab'], 0, 'uint16', [len(ids)])
    (folder / 'manifest.json').write_text(json.dumps(asdict(manifest)), encoding='utf-8')
    return Batches(Tokens(folder), size['seq_len'], size['batch'])

class Clock:
    "Called after each step: after `warm` steps the time begins, after all of them it ends."
    def __init__(self, size): self.size, self.step, self.times = size, 0, []

    def __call__(self):
        self.step += 1
        if self.step not in (self.size['warm'], self.size['steps']): return False
        if torch.cuda.is_available(): torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        if len(self.times) == 1 and torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
        return len(self.times) == 2

    @property
    def tokens_per_second(self):
        size = self.size
        return (size['steps'] - size['warm']) * size['batch'] * size['seq_len'] / (self.times[1] - self.times[0])

def measure(arm: str, size: dict, tiny: bool) -> dict:
    "Tokens/s, MFU and peak memory (after the first steps) of an arm."
    student, clock = neox(size['student'], size), Clock(size)
    teacher = None if arm.endswith('ce') else neox(size['teacher'], size).to(torch.bfloat16).eval().requires_grad_(False)
    cost = 3 * flops(size['student'], size) + (flops(size['teacher'], size) if arm.endswith('live') else 0)
    with tempfile.TemporaryDirectory() as folder:
        batches = text(Path(folder) / 'tokens', size)
        (trainer if arm.startswith('trainer') else ours)(arm, student, teacher, batches, size, Path(folder), clock, compile=not tiny)
    from slm_begin.pretrain import peak_flops
    speed, gpu = clock.tokens_per_second, torch.cuda.get_device_name() if torch.cuda.is_available() else ''
    peak = peak_flops(torch.device('cuda'), True)[0] if gpu else None
    memory = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return dict(arm=arm, trainer='Hugging Face Trainer' if arm.startswith('trainer') else 'slm_begin', objective=arm.removeprefix('trainer-'),
                tokens_per_second=round(speed), mfu=round(speed * cost / peak, 4) if peak else None, memory_gb=round(memory / 1e9, 2),
                student=student.num_parameters(), teacher=teacher and teacher.num_parameters(),
                **{k: size[k] for k in ('vocab', 'seq_len', 'batch', 'micro', 'steps')})

def ours(arm, student, teacher, batches, size, folder, clock, compile):
    from slm_begin.cache import Cached, cache_teacher
    from slm_begin.data import Stopped
    from slm_begin.distill import CrossEntropy, Distill
    from slm_begin.pretrain import TrainConfig, pretrain
    rows = (size['steps'] + 1) * size['batch']
    cfg = TrainConfig(tokens=rows * size['seq_len'], seq_len=size['seq_len'], batch_size=size['batch'],
                      micro_batch_size=size['micro'], lr=1e-4, precision='bf16', compile=compile)
    if arm == 'ce': objective = CrossEntropy()
    elif arm == 'live': objective = Distill(teacher)
    else:
        objective = Cached(cache_teacher(teacher, batches, folder / 'cache', rows, precision='bf16', micro_batch_size=size['micro']))
        teacher.to('cpu')                                               # as if the cache had been there: a teacher takes no memory then
    with contextlib.suppress(Stopped): pretrain(student, batches, cfg, folder / 'run', objective, say=lambda line: None, stop=clock)

def trainer(arm, student, teacher, batches, size, folder, clock, compile):
    from torch.nn import functional as F
    from transformers import Trainer, TrainerCallback, TrainingArguments
    class Tick(TrainerCallback):
        def on_step_end(self, args, state, control, **kw): clock()
    class Distilling(Trainer):
        "alpha x cross-entropy + beta x KL, from logits that stand in memory whole."
        def compute_loss(self, model, inputs, num_items_in_batch=None, **kw):
            if teacher is None: return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch, **kw)
            ids = inputs['input_ids']
            logits, y = model(input_ids=ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
            with torch.no_grad(): known = teacher(input_ids=ids).logits[:, :-1].flatten(0, 1).float()
            kl = F.kl_div(logits.log_softmax(-1), known.log_softmax(-1), reduction='batchmean', log_target=True)
            return (.3 * F.cross_entropy(logits, y) + .7 * kl) / self.args.gradient_accumulation_steps
    rows = [dict(input_ids=r[:-1], labels=r[:-1]) for i in range(size['steps']) for r in batches[i]]
    args = TrainingArguments(str(folder / 'run'), max_steps=size['steps'], per_device_train_batch_size=size['micro'], learning_rate=1e-4, bf16=True,
                             gradient_accumulation_steps=size['batch'] // size['micro'], weight_decay=.1, adam_beta2=.95, optim='adamw_torch_fused',
                             torch_compile=compile, use_cpu=not torch.cuda.is_available(), report_to='none', disable_tqdm=True, logging_strategy='no',
                             save_strategy='no', remove_unused_columns=False)
    if compile and teacher is not None: teacher.compile()
    Distilling(student, args, train_dataset=rows, callbacks=[Tick()]).train()
