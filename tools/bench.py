"""Ratios, measured side by side on this machine: `python tools/bench.py attention`, `supernet` or `sampling` (a minute each at most), `cache` (five),
`training` (ten), `distill` (ten, and 12 GB of memory); `text 200 1000` for memory and speed with so many megabytes of text (minutes);
`gpu`, for which see `bench_gpu.py`."""
import argparse
import contextlib
import itertools
import multiprocessing
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch


def attention(repeats=5):
    "A training step with our attention for CPUs against transformers' `sdpa`: the teacher and a student of the demo, in windows of 256 and 512."
    from slm_begin.distill import CrossEntropy
    from slm_begin.pretrain import fast_attention
    from slm_begin.supernet import Supernet, precision_of
    net, cpu = Supernet.from_pretrained(), torch.device('cpu')
    sub = net.subnet([0, 3, 5], 160, 5, 512)
    bf16 = precision_of()=='bf16'
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {'bf16' if bf16 else 'fp32'}")
    for what, shape in ('teacher', net.full), ('student', sub):
        for window in 256, 512:
            model = net.extract(shape)
            batch = torch.randint(net.sizes['vocab'], (2048 // window, window + 1))
            def step(m=model, b=batch):
                with torch.autocast('cpu', torch.bfloat16, enabled=bf16): CrossEntropy()(m, b)[0].backward()
            def ours(m=model, s=step):
                with fast_attention(m, cpu): s()
            print(f"{what}, windows of {window}: ours {side_by_side(step, ours, repeats):.2f} x as fast")

def training(repeats=5, steps=8):
    """Tokens/s of `pretrain`, of a bare PyTorch loop (also with our attention and our loss), and of Hugging Face's Trainer, the four taking turns;
    in brackets by the processor's time, which other work on the machine disturbs less."""
    import accelerate
    import transformers

    from slm_begin.data import Batches, Tokens, load_corpus, load_tokenizer, tokenize
    transformers.logging.set_verbosity_error()
    print(f"{_cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"accelerate {accelerate.__version__}; 8 windows of 256 tokens a step, median of {repeats} rounds", flush=True)
    loops = dict(ours=_ours, bare=_bare, bare_with_ours=_bare_with_ours, trainer=_trainer)
    with tempfile.TemporaryDirectory() as folder:
        tokenize(load_corpus(), load_tokenizer(), f'{folder}/tokens', max_tokens=100_000)
        batches = Batches(Tokens(f'{folder}/tokens'), 256, 8)
        for vocab, width, layers in (4096, 256, 3), (50304, 64, 2):
            for precision in 'fp32', 'bf16':
                rounds = []
                for _ in range(repeats + 1):                            # the first one warms up
                    order = random.sample([*loops], len(loops))
                    rounds.append({k: loops[k](_neox(vocab, width, layers), batches, precision, steps) for k in order})
                size = _neox(vocab, width, layers).num_parameters()
                print(f"{size:,} parameters, vocabulary {vocab:,}, {precision}: {_faster(rounds[1:], 2048)}", flush=True)

def _faster(rounds, tokens):
    speed = lambda k: f"{tokens / statistics.median(r[k][0] for r in rounds):,.0f}"
    ratio = lambda k, i: statistics.median(r[k][i] / r['ours'][i] for r in rounds)
    than = lambda k: f"{ratio(k, 0):.2f} x ({ratio(k, 1):.2f} x)"
    return (f"ours {speed('ours')} tokens/s; {than('trainer')} the Trainer's {speed('trainer')}, {than('bare')} the bare loop's {speed('bare')}, "
            f"{than('bare_with_ours')} the {speed('bare_with_ours')} of a bare loop with our attention and loss")

def _cpu():
    "The processor's name."
    info = Path('/proc/cpuinfo')
    names = [line.split(':')[1].strip() for line in info.read_text().splitlines() if line.startswith('model name')] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()

def _neox(vocab, width, layers):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
                                            intermediate_size=4 * width, max_position_embeddings=512))

def _now(): return time.perf_counter(), time.process_time()

def _step_seconds(times):
    "Seconds a step, by the clock and of the processor; the first steps warm up."
    return tuple(statistics.median(b[i] - a[i] for a, b in zip(times[1:], times[2:])) for i in (0, 1))

def _ours(model, batches, precision, steps):
    from slm_begin.pretrain import Stopped, TrainConfig, pretrain
    cfg, times = TrainConfig(tokens=(steps + 1) * 2048, seq_len=256, batch_size=8, lr=1e-3, precision=precision), []
    def stop():
        times.append(_now())
        return len(times) == steps
    with tempfile.TemporaryDirectory() as out, contextlib.suppress(Stopped): pretrain(model, batches, cfg, out, say=lambda line: None, stop=stop)
    return _step_seconds(times)

def _bare(model, batches, precision, steps, loss=None):
    "What every tutorial writes, and nothing else: no log, no checkpoint, no check."
    opt = torch.optim.AdamW(model.train().parameters(), lr=1e-3, betas=(.9, .95), weight_decay=.1, fused=True)
    loss, times = loss or (lambda b: model(input_ids=b[:, :-1], labels=b[:, :-1]).loss), []
    for i in range(steps):
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'): loss_of_step = loss(batches[i])
        loss_of_step.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        opt.zero_grad()
        times.append(_now())
    return _step_seconds(times)

def _bare_with_ours(model, batches, precision, steps):
    from slm_begin.distill import CrossEntropy
    from slm_begin.pretrain import fast_attention
    with fast_attention(model, torch.device('cpu')): return _bare(model, batches, precision, steps, lambda b: CrossEntropy()(model, b)[0])

def _trainer(model, batches, precision, steps):
    from transformers import Trainer, TrainerCallback, TrainingArguments
    times = []
    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kw): times.append(_now())
    rows = [dict(input_ids=r[:-1], labels=r[:-1]) for i in range(steps) for r in batches[i]]
    with tempfile.TemporaryDirectory() as out:
        args = TrainingArguments(out, max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-3, weight_decay=.1, adam_beta2=.95, max_grad_norm=1.,
                                 optim='adamw_torch_fused', bf16=precision == 'bf16', use_cpu=True, report_to='none', disable_tqdm=True, logging_strategy='no',
                                 save_strategy='no', remove_unused_columns=False)
        Trainer(model, args, train_dataset=rows, callbacks=[Clock()]).train()
    return _step_seconds(times)

def supernet(repeats=15):
    "Counting; cutting half out of Pythia-70M's shape; and the forward pass of what was cut out against the same shapes built from scratch. One core."
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from slm_begin.supernet import Subnet, Supernet
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = dict(hidden_size=512, num_attention_heads=8, intermediate_size=2048, vocab_size=50304)
    rng, some = random.Random(0), lambda size, n: rng.sample(range(size), n)
    with torch.device('meta'): deep = Supernet(GPTNeoXForCausalLM(GPTNeoXConfig(**shape, num_hidden_layers=32)))
    new = [deep.subnet(None, some(512, 256), tuple(some(8, rng.randint(1, 8)) for _ in range(32)), tuple(some(2048, rng.randint(1, 2048)) for _ in range(32)))
           for _ in range(100)]
    described = [(s.layers, tuple(s.embd), tuple(map(tuple, s.heads)), tuple(map(tuple, s.ffn))) for s in new]
    each = lambda f: statistics.median(clock(f) for _ in range(repeats)) * 1e6 / len(new)
    print(f"counting, 32 layers of different sizes: {each(lambda: [deep.count(s) for s in new]):.1f} microseconds each; "
          f"to make a description of known indices {each(lambda: [Subnet(s.layers, s.embd, s.heads, s.ffn) for s in new]):.1f}, "
          f"of new ones, which are looked through, {each(lambda: [Subnet(*d) for d in described]):,.0f}")

    net = Supernet(GPTNeoXForCausalLM(GPTNeoXConfig(**shape, num_hidden_layers=6)))
    for what, embd, ffn in ('the first channels', range(256), range(2048)), ('any channels', some(512, 256), some(2048, 2048)):
        half = net.subnet(None, embd, 4, ffn)
        seconds = statistics.median(clock(lambda half=half: net.extract(half)) for _ in range(repeats))
        print(f"cutting {net.count(half):,} of {net.count(net.full):,} parameters out, {what}: {seconds:.3f} s")

    plain, ids = GPTNeoXForCausalLM(net.extract(half).config), torch.randint(50304, (2, 256))
    read = lambda model: torch.no_grad()(lambda: model(input_ids=ids, use_cache=False))
    layerwise = net.subnet(None, some(512, 256), (4, 3, 4, 4, 5, 4), ffn)
    for what, sub in ('the same class', half), ('layers of different sizes', layerwise):
        faster = side_by_side(read(net.extract(sub).eval()), read(plain.eval()), repeats)
        print(f"forward pass of a model that was cut out ({what}): {faster:.3f} x the time of one built from scratch")

def cache(repeats=3):
    "A training step from the cache against one of cross-entropy: time and peak memory; writing against the teacher's plain forward pass. One core."
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for method in dict(method='sample'), dict(method='topk', k=16):
            print(in_process(_cache_times, folder, method, repeats), flush=True)
            peaks = [in_process(_cache_memory, folder, method, objective) for objective in ('cross-entropy', 'cached')]
            print(f"    peak memory of steps {peaks[1] / 2**20:.2f} GB, {peaks[1] / peaks[0]:.3f} x that of cross-entropy", flush=True)

def in_process(f, *args):
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool: return pool.submit(f, *args).result()

def _cache_parts(folder, method):
    "A student and a teacher with Pythia's vocabulary, 4 batches of 4,096 tokens, and their cache. The teacher's head is sharpened, as random weights are flat."
    import json
    from dataclasses import asdict

    import numpy as np
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from slm_begin.cache import cache_teacher
    from slm_begin.data import Batches, Manifest, Tokens
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = lambda width: GPTNeoXForCausalLM(GPTNeoXConfig(hidden_size=width, num_attention_heads=8, num_hidden_layers=6, intermediate_size=4 * width,
                                                           vocab_size=50304)).eval()
    student, teacher, folder = model(256), model(512), Path(folder)
    teacher.lm_head.weight.data *= 8
    if not (folder / 'tokens').exists():
        (folder / 'tokens').mkdir()
        ids = np.random.default_rng(0).integers(50254, size=4 * 4096 + 1).astype('uint16')
        ids.tofile(folder / 'tokens' / 'shard-00000.bin')
        manifest = Manifest('random', 'random', 1, len(ids), len(ids), 50254, 0, 'uint16', [len(ids)])
        (folder / 'tokens' / 'manifest.json').write_text(json.dumps(asdict(manifest)))
    batches = Batches(Tokens(folder / 'tokens'), 512, 8)
    return student, teacher, batches, cache_teacher(teacher, batches, folder / method['method'], **method, precision='fp32', say=lambda line: None)

def _cache_steps(student, batches, cached):
    from slm_begin.cache import Cached
    from slm_begin.distill import CrossEntropy
    count = itertools.count()
    def step(objective):
        i = next(count) % 4
        student.zero_grad()
        objective(student, batches[i], windows=batches.window_ids(i, 0, 8))[0].backward()
    return {'cross-entropy': lambda: step(CrossEntropy()), 'cached': lambda: step(Cached(cached))}

def _cache_times(folder, method, repeats) -> str:
    student, teacher, batches, made = _cache_parts(folder, method)
    cpu = lambda f: -time.process_time() + (f(), time.process_time())[1]                # of one thread, whatever else the machine does
    rows, windows, write = batches[0].split(2), batches.window_ids(0, 0, 8), dict(rows=8, **method, precision='fp32', say=lambda line: None)
    plain = lambda: [torch.inference_mode()(teacher)(input_ids=r[:, :-1], use_cache=False).logits for r in rows]
    from slm_begin.cache import cache_teacher
    written = lambda: cache_teacher(teacher, batches, tempfile.mkdtemp(dir=folder), **write)
    steps = _cache_steps(student, batches, made)
    for f in (*steps.values(), plain): f()
    slower = statistics.median(cpu(steps['cached']) / cpu(steps['cross-entropy']) for _ in range(repeats))
    dearer = statistics.median(cpu(written) / cpu(plain) for _ in range(repeats))
    kept, speed = made.identity.get('draws') or made.identity['k'], 4096 / cpu(written)
    unique, read = (made.read(windows).probs > 0).sum(-1).float().mean(), cpu(lambda: made.read(windows)) / cpu(steps['cached'])
    return (f"{method['method']} {kept}: {made.manifest['bytes_per_token']} bytes a token at {unique:.1f} ids; a step of 4,096 tokens takes {slower:.3f} x "
            f"the time of cross-entropy ({read:.1%} of it for reading)\n    written at {speed:,.0f} tokens/s, in {dearer:.2f} x the time of the teacher's "
            f"plain forward pass")

def _cache_memory(folder, method, objective) -> int: # KB, above what was there before the steps
    student, _, batches, made = _cache_parts(folder, method)
    step, now = _cache_steps(student, batches, made)[objective], lambda what: int(Path('/proc/self/status').read_text().split(what + ':')[1].split()[0])
    Path('/proc/self/clear_refs').write_text('5')                               # Linux: the peak is now what is there
    before = now('VmRSS')
    for _ in range(2): step()
    return now('VmHWM') - before

def distill(repeats=1):
    """Loss and gradient for 8,192 tokens, a vocabulary of 50,304, a student of width 256 and a teacher of width 512: peak memory and time of chunks
    against the dense formulation. Each in a fresh process, the two taking turns; time is of the processor, over all threads."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; GB above what was there before, seconds of the processor")
    for what in 'cross-entropy', 'kl', 'reverse-kl', 'js', 'skew-kl', 'tv':
        pairs = [[in_process(_distill_step, what, dense) for dense in (True, False)] for _ in range(repeats)]
        (gb, s), (our_gb, our_s) = ([statistics.median(pair[i][k] for pair in pairs) for k in (0, 1)] for i in (0, 1))
        ratio = statistics.median(ours[1] / dense[1] for dense, ours in pairs)
        same = max(abs(dense[2] - ours[2]) / dense[2] for dense, ours in pairs)
        print(f"{what:14} dense {gb:5.2f} GB {s:5.1f} s; in chunks {our_gb:5.2f} GB {our_s:5.1f} s: memory {our_gb / gb:.2f} x, time {ratio:.2f} x "
              f"(losses differ by {same:.0e} of themselves)", flush=True)

class _States(torch.nn.Module):
    "A causal LM of which only the output projection is there: its hidden states are given."
    def __init__(self, width, n=8192, vocab=50304):
        super().__init__()
        self.hidden, self.lm_head, self.config = torch.nn.Parameter(torch.randn(n, width)), torch.nn.Linear(width, vocab, bias=False), SimpleNamespace()
        self.base_model = lambda input_ids, **kw: SimpleNamespace(last_hidden_state=self.hidden[:input_ids.numel()][None], hidden_states=None)
    def get_output_embeddings(self): return self.lm_head
    def forward(self, input_ids, **kw): return SimpleNamespace(logits=self.lm_head(self.base_model(input_ids).last_hidden_state))

def _distill_step(what, dense) -> tuple: # GB, seconds, the loss
    from slm_begin.distill import CrossEntropy, Distill
    torch.manual_seed(0)
    student, teacher, ids = _States(256), _States(512).requires_grad_(False), torch.randint(50304, (1, 8193))
    objective = CrossEntropy() if what == 'cross-entropy' else Distill(teacher, loss=what)
    with torch.no_grad(): objective(student, ids[:, :9])                # warm up, and the comparisons
    step = (lambda: _dense(student, teacher, ids, what)) if dense else (lambda: objective(student, ids)[0])
    now = lambda key: int(Path('/proc/self/status').read_text().split(key + ':')[1].split()[0]) / 2**20
    Path('/proc/self/clear_refs').write_text('5')                       # Linux: the peak is now what is there
    before, start = now('VmRSS'), time.process_time()
    loss = step()
    loss.backward()
    return now('VmHWM') - before, time.process_time() - start, loss.item()

def _dense(student, teacher, ids, what):
    "As one writes it: whole logits, and the library's own losses where it has them."
    import torch.nn.functional as F
    logits = student(ids[:, :-1]).logits[0]
    ce = F.cross_entropy(logits, ids[0, 1:])
    if what == 'cross-entropy': return ce
    with torch.no_grad(): p = teacher(ids[:, :-1]).logits[0].log_softmax(-1)
    q, kl = logits.log_softmax(-1), lambda a, b: F.kl_div(b, a, reduction='batchmean', log_target=True)
    mix = lambda s: torch.log(s * p.exp() + (1 - s) * q.exp())
    if what == 'kl': far = kl(p, q)
    elif what == 'reverse-kl': far = kl(q, p)
    elif what == 'skew-kl': far = kl(p, mix(.1))
    elif what == 'js': far = .1 * kl(p, m := mix(.1)) + .9 * kl(q, m)
    else: far = (p.exp() - q.exp()).abs().sum(-1).mean() / 2
    return .3 * ce + .7 * far

def clock(f):
    "Seconds of the processor that `f` takes; for one thread, whatever else the machine does."
    start = time.process_time()
    f()
    return time.process_time() - start

def sampling(n=1000, fine=50):
    "Sub-networks of half of a 7 B Llama (no weights), +-5 %, in seconds of one core: what each costs, and what rejection costs, which draws nothing but sizes."
    import numpy as np
    from transformers import AutoModelForCausalLM, LlamaConfig

    from slm_begin.importance import orders
    from slm_begin.space import GRANULARITIES, ParamBin, SearchSpace
    from slm_begin.supernet import Supernet
    torch.set_num_threads(1)
    cfg = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, vocab_size=32000)
    with torch.device('meta'): net = Supernet(AutoModelForCausalLM.from_config(cfg))
    bin, shuffled = ParamBin.around(net.count(net.full), .5), orders('random', net)
    for granularity in GRANULARITIES:
        for order in None, shuffled:
            space = SearchSpace(net, granularity, order)
            k = fine if space.fine else n
            first, *ms = moves_ms(space, bin, k, fine)
            print(f"{granularity:16} {space.orders.kind:8} order: {n} in {first * n / 1000:.2f} s ({first:.2f} ms each); another {k}: {ms[0]:.2f} ms, "
                  f"mutated {ms[1]:.2f} ms, crossed {ms[2]:.2f} ms")
    rng, r, tries, got, start = np.random.default_rng(0), SearchSpace(net).ranges, 0, 0, time.process_time()
    while got < n:
        depth, embd = rng.choice(r['layers']), rng.choice(r['embd'])
        got += net.count_sizes(depth, embd, rng.choice(r['heads'], depth).sum(), rng.choice(r['ffn'], depth).sum()) in bin
        tries += 1
    print(f'rejection: {n} of {tries:,} draws lie in the bin ({n / tries:.2%}); {time.process_time() - start:.1f} s')

def moves_ms(space, bin, k, fine):
    "Milliseconds a candidate: the first k (with solving the bin), the next k, mutations, crossings."
    rng, subs = random.Random(0), []
    for many, move in (k, space.sample), (k, space.sample), (fine, space.mutate), (fine, space.crossover):
        parents = [() if move == space.sample else (subs[i],) if move == space.mutate else (subs[i], subs[i - 1]) for i in range(many)]
        start = time.process_time()
        made = [move(rng, *p, bin) for p in parents]
        yield 1000 * (time.process_time() - start) / many
        assert all(space.supernet.count(s) in bin for s in made)
        subs = subs or made

def text(*megabytes):
    "Peak memory of fresh processes that tokenise one text file of so many megabytes, made from the embedded corpus, and that read its tokens as batches."
    from slm_begin.data import load_corpus
    books = [row['text'] for row in load_corpus()]
    tokenise = "prepare(sys.argv[1], 'train', load_tokenizer(), sys.argv[2], say=lambda s: None)"
    read = "b = Batches(Tokens(sys.argv[2]), 512, 64)\nfor i in range(b.n_windows // 64): b[i]"
    for mb in megabytes or (200, 1000):
        with tempfile.TemporaryDirectory() as at:
            rng, size = random.Random(0), 0
            with open(f'{at}/text.txt', 'w', encoding='utf-8') as f:
                while size < mb * 1e6:
                    f.write(book := rng.choice(books))
                    size += len(book.encode())
            (idle, _), (made, seconds), (used, reading) = (measured(work, f'{at}/text.txt', f'{at}/tokens') for work in ('load_tokenizer()', tokenise, read))
            n = sum(f.stat().st_size for f in Path(at).glob('tokens/*.bin')) // 2
        print(f"{size/1e6:,.0f} MB of text, {n/1e6:,.1f} M tokens: tokenised in {seconds:,.0f} s "
              f"({size/1e6/seconds:.1f} MB, {n/1e6/seconds:.2f} M tokens a second), "
              f"peak memory {made:,.0f} MB; an epoch read in {reading:,.0f} s, peak memory {used:,.0f} MB; with nothing to do {idle:,.0f} MB")

def measured(work, *args):
    "Peak memory in megabytes, and seconds, of a piece of work in a process of its own."
    head = "import resource, sys, time, torch\nfrom slm_begin.data import *\nstart = time.time()\n"
    tail = "\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.time() - start)"
    out = subprocess.run([sys.executable, '-c', head + work + tail, *args], check=True, capture_output=True, text=True).stdout
    return map(float, out.split()[-2:])

def side_by_side(a, b, repeats):
    "The median of how many times faster `b` is than `a`, the two taking turns."
    a(), b()
    return statistics.median(seconds(a) / seconds(b) for _ in range(repeats))

def seconds(f):
    start = time.perf_counter()
    f(), f()
    return time.perf_counter() - start

def gpu(*options):
    "Training on one GPU, arm by arm: `bench_gpu.py` says how."
    import bench_gpu
    bench_gpu.main(options)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    benchmarks = dict(attention=attention, supernet=supernet, sampling=sampling, cache=cache, distill=distill, training=training, text=text, gpu=gpu)
    p.add_argument('what', choices=benchmarks)
    p.add_argument('sizes', nargs='*', type=float, help="of `text`, in megabytes")
    given, options = p.parse_known_args()
    if options and given.what != 'gpu': p.error(f"unknown: {' '.join(options)}")
    benchmarks[given.what](*given.sizes, *options)
