"""Ratios, measured side by side in one process on this machine: `python tools/bench.py attention` or `supernet` (half a minute each)."""
import argparse
import random
import statistics
import time

import torch


def attention(repeats=5):
    "A training step with our attention for CPUs against transformers' `sdpa`: the teacher and a student of the demo, in windows of 256 and 512."
    from slm_begin.distill import CrossEntropy
    from slm_begin.pretrain import fast_attention, precision_of
    from slm_begin.supernet import Supernet
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
    p.add_argument('what', choices=['attention', 'supernet'])
    dict(attention=attention, supernet=supernet)[p.parse_args().what]()
