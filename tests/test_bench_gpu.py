"tools/bench_gpu.py runs from end to end where there is no GPU, and keeps what is measured apart from what is not."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

tools = Path(__file__).parents[1] / 'tools'
ARMS = 'ce', 'live', 'cached', 'trainer-ce', 'trainer-live'


def arm(out, *options):
    sys.path.insert(0, str(tools))
    import bench_gpu
    bench_gpu.main(['--tiny', '--out', str(out), *options])

@pytest.mark.slow
def test_every_arm_runs_in_toy_sizes(processes, tmp_path):
    "Each in a process of its own, in any order; one that is run again takes the place of its result."
    for name in *reversed(ARMS), 'ce':
        p = processes(arm, tmp_path / 'gpu.json', '--arm', name)
        p.join(300)
        assert p.exitcode == 0, name
    kept = json.loads((tmp_path / 'gpu.json').read_text())
    assert [r['arm'] for r in kept['runs']] == [*ARMS] and kept['gpu'] is None and {*kept['versions']} == {'torch', 'transformers', 'accelerate'}
    for r in kept['runs']: assert r['tokens_per_second'] > 0 and r['mfu'] is None and (r['teacher'] is None) == r['arm'].endswith('ce')

@pytest.mark.slow
def test_without_a_gpu_it_says_so():
    run = lambda *options: subprocess.run([sys.executable, tools / 'bench.py', 'gpu', *options], capture_output=True, text=True,
                                          env=os.environ | {'CUDA_VISIBLE_DEVICES': ''})
    refused = run('--arm', 'ce')
    assert refused.returncode == 2 and 'no CUDA GPU here; --tiny shows that all of it runs, and measures nothing' in refused.stderr
    assert 'invalid choice' in run('--arm', 'none', '--tiny').stderr
