"""Ratios, measured side by side in one process on this machine: `python tools/bench.py attention` (half a minute)."""
import argparse
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
    p.add_argument('what', choices=['attention'])
    {'attention': attention}[p.parse_args().what]()
