"""Ratios, measured side by side in one process on this machine: `python tools/bench.py attention`, `supernet` or `sampling` (a minute each at most)."""
import argparse
import random
import statistics
import time

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

def side_by_side(a, b, repeats):
    "The median of how many times faster `b` is than `a`, the two taking turns."
    a(), b()
    return statistics.median(seconds(a) / seconds(b) for _ in range(repeats))

def seconds(f):
    start = time.perf_counter()
    f(), f()
    return time.perf_counter() - start

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__)
    benchmarks = dict(attention=attention, supernet=supernet, sampling=sampling)
    p.add_argument('what', choices=benchmarks)
    benchmarks[p.parse_args().what]()
