"""What every test may use: tiny models and texts, real processes.
Tests marked `cuda` are skipped without a GPU; the `chromium` fixture skips without a browser, except in CI, where it fails."""
import multiprocessing
import os
import shutil

import pytest


def pytest_collection_modifyitems(items):
    cuda = [o for o in items if 'cuda' in o.keywords]
    if not cuda: return
    import torch
    if torch.cuda.is_available(): return
    for o in cuda: o.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope='session')
def chromium():
    "Path of a Chromium or Chrome."
    path = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if path: return path
    how = "no Chromium found: `apt-get install chromium`, as .ci/run does"
    if os.environ.get('CI'): pytest.fail(how)
    pytest.skip(how)


@pytest.fixture
def one_thread():
    "As in the processes, so that sums are made in the same order."
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_model(tie=False, seed=0, noise=.1, **kw):
    "A GPT-NeoX of 3 layers and width 32, with weights that are trivial nowhere."
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    torch.manual_seed(seed)
    cfg = dict(vocab_size=128, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64,
               tie_word_embeddings=tie, bos_token_id=0, eos_token_id=0, initializer_range=.2 if noise else .02)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**{**cfg, **kw})).eval()
    for p in model.parameters(): p.data += noise * torch.randn_like(p)
    return model


def write_tokens(folder, n=20_000, vocab=128, seed=0, shard_tokens=7_001, ids=None):
    "A folder of `Tokens` made of a repeating pattern with noise, which a tiny model can learn."
    import json
    from dataclasses import asdict

    import numpy as np

    from slm_begin.data import Manifest, Tokens
    rng = np.random.default_rng(seed)
    if ids is None: ids = np.where(rng.random(n) < .2, rng.integers(vocab, size=n), np.arange(n) * 7 % vocab)
    ids = np.asarray(ids, dtype='uint16')
    folder.mkdir(parents=True)
    parts = [ids[i:i+shard_tokens] for i in range(0, len(ids), shard_tokens)]
    for i,part in enumerate(parts): part.tofile(folder/f'shard-{i:05}.bin')
    man = Manifest('t' * 16, f'{seed:016}', 1, len(ids), len(ids), vocab, 0, 'uint16', [len(o) for o in parts])
    (folder/'manifest.json').write_text(json.dumps(asdict(man)))
    return Tokens(folder)


@pytest.fixture(scope='session')
def tok():
    "The embedded tokenizer."
    from slm_begin.data import load_tokenizer
    return load_tokenizer()


@pytest.fixture(scope='session')
def processes():
    """Start real processes: `processes(function, *args)`. They are forked from a server that has imported torch and the package but run nothing,
    so each costs milliseconds; what is alive at the end of the session is killed."""
    context = multiprocessing.get_context('forkserver')
    gpt_neox = 'transformers.models.gpt_neox.modeling_gpt_neox'
    context.set_forkserver_preload(['torch', 'torch._dynamo', gpt_neox, 'accelerate', 'pytest', 'slm_begin.pretrain', 'slm_begin.search'])
    started = []
    def start(function, *args, env=()):
        p = context.Process(target=_child, args=(function, args, dict(env)))
        p.start()
        started.append(p)
        return p
    yield start
    for p in started:
        if p.is_alive(): p.kill()


def _child(function, args, env):
    os.environ.update(env)
    import torch
    torch.set_num_threads(1)
    function(*args)
