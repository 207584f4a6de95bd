"scale: plans for machines that are not here, recipes of large models at full size without weights, and end to end with tiny checkpoints of the same layout."
import gc
import json
import os
import random
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_pipeline import quiet

from slm_begin import pipeline
from slm_begin.cli import main
from slm_begin.pipeline import BinConfig, Run, load_recipe, plan, run
from slm_begin.scale import (
    ASSUMED,
    GPUS,
    at_hand,
    disk,
    measured,
    memory,
    reading_memory,
    shipped_configs,
    teacher_config,
    without_weights,
)
from slm_begin.space import SearchSpace
from slm_begin.supernet import Supernet, resized

root = Path(__file__).parents[1]
LARGE = {'pythia-410m': 405_334_016, 'pythia-1b': 1_011_781_632, 'pythia-2.8b': 2_775_208_960, 'qwen3-0.3b': 300_000_000, 'smollm-135m': 134_515_008}
NEOX = next((p for p in (root.parent/'shared'/'data'/'gpt-neox-20b-tokenizer.json', Path('/work/shared/data/gpt-neox-20b-tokenizer.json')) if p.exists()), None)


@pytest.fixture
def offline(monkeypatch):
    "As if there were no network, and nothing in the Hub's cache."
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)


@pytest.fixture(scope='module')
def planned():
    "Recipe -> a run with its teacher on the meta device."
    made = {}
    def make(name):
        if name not in made:
            made[name] = Run(load_recipe(name))
            made[name].supernet, _ = without_weights(made[name].recipe.teacher)
        return made[name]
    return make


# Configs and counts

@pytest.mark.parametrize('size, shape', [
    (405_334_016, (1024, 24, 16, 4096)), (1_011_781_632, (2048, 16, 8, 8192)), (2_775_208_960, (2560, 32, 32, 10240))])
def test_the_bins_are_those_of_the_pythias(size, shape, offline):
    "PAPER.md section 3: the middle of each bin is a Pythia's number of parameters, counted here by building it."
    from transformers import AutoModelForCausalLM
    embd, layers, heads, ffn = shape
    config = resized(teacher_config('EleutherAI/pythia-6.9b')[0], range(layers), embd=embd, queries=heads, ffn=ffn, vocab=50_304)
    with torch.device('meta'): net = Supernet(AutoModelForCausalLM.from_config(config))
    assert net.count(net.full) == size
    assert size in LARGE.values()


def test_a_folder_goes_before_the_shipped_config(tmp_path, offline):
    for name, folder in shipped_configs().items():
        config, where = teacher_config(name)
        assert where.startswith('the package')
        resized(config, range(2)).save_pretrained(tmp_path/folder.name)
        assert teacher_config(str(tmp_path/folder.name))[0].num_hidden_layers == 2


def test_a_model_that_nobody_knows(offline):
    with pytest.raises(ConnectionError, match=r'cannot reach the Hub for the model `nobody/none`.* the sizes of EleutherAI/pythia-6.9b'):
        plan(replace(load_recipe('tiny'), teacher='nobody/none'))
    with pytest.raises(FileNotFoundError, match='no such folder'): teacher_config('no/such/model')


def test_weights_that_are_too_many_are_not_tried(tmp_path):
    assert at_hand('embedded') and at_hand('no/such/folder') and not at_hand('nobody/none')
    (tmp_path/'model-00001-of-00002.safetensors').write_bytes(b'x' * 1000)
    assert at_hand(str(tmp_path)) and not at_hand(str(tmp_path), most=999)


def test_a_bin_by_parameters():
    assert BinConfig(parameters=1000, tolerance=.05).of(10**9) == BinConfig(fraction=.5, tolerance=.05).of(2000)
    with pytest.raises(ValueError, match='`parameters` is 0'): BinConfig(parameters=0)


# Recipes at full size, without weights

@pytest.mark.parametrize('name', LARGE)
def test_the_recipe_fits_its_teacher(name, planned):
    r = planned(name)
    assert r.recipe.bin.parameters == LARGE[name] and abs(r.bin.low - .95 * LARGE[name]) <= 1 and all(p.is_meta for p in r.supernet.model.parameters())
    assert r.recipe.train.tokens == 10_000_000_000 and r.recipe.train.tokens < r.recipe.text.max_tokens
    assert len({r.recipe.text.train, r.recipe.text.calib, r.recipe.text.valid}) == 3
    r.recipe.train.eval_steps()
    with pytest.raises(ConnectionError, match='tokenizer'):      # all else is right
        with pytest.MonkeyPatch.context() as m:
            m.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
            r.check_sizes()


@pytest.mark.parametrize('granularity', ['coarse-uniform', 'coarse-layerwise'])
@pytest.mark.parametrize('name', LARGE)
def test_sub_networks_of_the_real_size(name, granularity, planned):
    "Drawn, changed and crossed inside the paper's bins; the count is what the cut-out model, on the meta device, has; sizes suit GPUs."
    r = planned(name)
    net = r.supernet
    settings = {k: v for k, v in vars(r.recipe.space).items() if k not in ('order', 'score', 'granularity')}
    space, rng = SearchSpace(net, granularity, **settings), random.Random(0)
    subs = [*space.one_shots(r.bin), *(space.sample(rng, r.bin) for _ in range(8))]
    subs += [space.mutate(rng, subs[0], r.bin), space.crossover(rng, subs[0], subs[-1], r.bin)]
    for s in subs:
        assert net.count(s) in r.bin and len(s.embd) % 64 == 0 and all(len(f) % 128 == 0 for f in s.ffn) and len(s.layers) >= 8
        assert net.flops(s, 2048) < net.flops(net.full, 2048)
    for s in subs[0], subs[-1]:
        cut = net.extract(s)
        assert all(p.is_meta for p in cut.parameters()) and sum(p.numel() for p in cut.parameters()) == net.count(s)


@pytest.mark.parametrize('name', LARGE)
def test_the_plan_adds_up(name, planned, monkeypatch):
    monkeypatch.setattr(pipeline, 'measured', dict)
    r = planned(name)
    p, n = r.plan_gpus('somewhere'), r.recipe.train.steps * r.recipe.train.tokens_per_step
    rows = {row['stage']: row for row in p.rows}
    assert [*rows] == ['teacher', 'importance', 'search', 'rerank', 'random search', 'cache', 'arm random', 'arm one-shot', 'arm evolved', 'arm evolved-kd']
    full, student = r.supernet.flops(r.supernet.full, 2048), r.supernet.flops(r.typical, 2048)
    assert rows['cache']['flops'] == n * full and 1 < rows['arm evolved']['flops'] / (3 * n * student) < 1.01
    assert p.flops == sum(row['flops'] for row in p.rows)
    assert rows['arm random']['hours'][0] == pytest.approx(rows['arm random']['flops'] / (GPUS[0].peak * ASSUMED) / 3600)
    assert rows['arm random']['hours'][0] == 8 * rows['arm random']['hours'][1] and rows['importance']['hours'][0] == rows['importance']['hours'][1]
    assert p.disk['cached logits'] == 36 * n / 1e9 and p.disk['tokens'] == r.recipe.text.max_tokens * (4 if name.startswith('qwen') else 2) / 1e9
    live, cached = (p.memory[k] for k in ('distillation, live bf16 teacher', 'distillation, cached teacher'))
    assert all(a > b for a, b in zip(live, cached)) and live[2] < live[0] < live[1]


def test_a_live_teacher_is_paid_in_each_arm(planned):
    r = planned('pythia-410m')
    n, full = r.recipe.train.steps * r.recipe.train.tokens_per_step, r.supernet.flops(r.supernet.full, 2048)
    other = Run(replace(r.recipe, arms=[replace(a, teacher='live', objective='kd') for a in r.recipe.arms]))
    other.supernet = r.supernet
    assert 'cache' not in other.stage_flops()
    for arm in ('arm random', 'arm evolved'): assert other.stage_flops()[arm][1] - r.stage_flops()[arm][1] == n * full


def test_a_hundred_billion_tokens(planned):
    "The header of each recipe says with which flags."
    for name in LARGE:
        line = next(line for line in pipeline.recipe_file(name).read_text().splitlines() if 'for 100 B:' in line)
        flags = line.split('for 100 B: ')[1].split(' (')[0].split()
        assert load_recipe(name, flags).train.tokens == 10**11 and load_recipe(name, flags).text.max_tokens > 10**11


@pytest.mark.parametrize('name', LARGE)
def test_plan_of_the_command_line_without_a_network(name, capsys, offline, monkeypatch):
    monkeypatch.setattr(pipeline, 'measured', dict)
    assert main(['plan', '--recipe', name]) == 0
    said = capsys.readouterr().out
    for part in (load_recipe(name).teacher, '40% of it: assumed, not measured', 'config from the package', 'FSDP on 8', 'cached logits 360 GB',
                 'not checked: tokenizer and texts'): assert part in said, said
    assert max(map(len, said.splitlines())) < 260


def test_a_measured_mfu_is_used(tmp_path, planned, monkeypatch):
    path = tmp_path/'gpu.json'
    assert measured(path) == {}
    runs = [('slm_begin', 'ce', .5), ('slm_begin', 'live', None), ('Hugging Face Trainer', 'ce', .3)]
    path.write_text(json.dumps(dict(runs=[dict(trainer=t, objective=o, mfu=m) for t, o, m in runs])))
    assert measured(path) == {'ce': .5}
    monkeypatch.setattr(pipeline, 'measured', lambda: measured(path))
    p = planned('pythia-410m').plan_gpus('somewhere')
    row = next(row for row in p.rows if row['stage'] == 'arm random')
    assert row['hours'][0] == pytest.approx(row['flops'] / (GPUS[0].peak * .5) / 3600) and 'ce 50% of it, measured' in str(p)


# Memory and disk, against what really exists

def tiny():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    return Supernet(GPTNeoXForCausalLM(GPTNeoXConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, vocab_size=256,
                                                     max_position_embeddings=64, tie_word_embeddings=False)))


def bytes_after_a_step(how):
    "A step of training under DDP or FSDP2, and the bytes that then exist in this process."
    from torch.distributed.fsdp import fully_shard
    model = tiny().model.requires_grad_(True).train()
    if how == 'fsdp':
        for layer in model.gpt_neox.layers: fully_shard(layer)
        fully_shard(model)
    else: model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(2, 16, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    local = lambda t: (t.to_local() if hasattr(t, 'to_local') else t).nbytes
    out = dict(weights=sum(map(local, model.parameters())), gradients=sum(local(p.grad) for p in model.parameters()),
               optimizer=sum(local(t) for state in optimizer.state.values() for t in state.values() if t.numel() > 1))
    if how == 'ddp': out['buckets'] = sum(map(int, model._get_ddp_logging_data()['bucket_sizes'].split(', ')))
    return out


def wrapped(rank, port, how, path):
    "One of two processes. The model goes before the process group: one that outlives it may end in a deadlock (in torch's destructor)."
    os.environ.update(RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), GLOO_SOCKET_IFNAME='lo')
    torch.distributed.init_process_group('gloo')
    Path(path).write_text(json.dumps(bytes_after_a_step(how)))
    gc.collect()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('how', ['ddp', 'fsdp'])
def test_bytes_of_distributed_training(how, processes, tmp_path):
    import socket
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    jobs = [processes(wrapped, rank, port, how, str(tmp_path/f'{rank}.json')) for rank in (0, 1)]
    for j in jobs: j.join(300)
    assert [j.exitcode for j in jobs] == [0, 0]
    net = tiny()
    said = memory(net, net.full, 1, 32, gpus=2, sharded=how == 'fsdp')
    real = [json.loads((tmp_path/f'{rank}.json').read_text()) for rank in (0, 1)]
    assert set(real[0]) == {'weights', 'gradients', 'optimizer'} | ({'buckets'} if how == 'ddp' else set()) and ('buckets' in said) == (how == 'ddp')
    for k in real[0]: assert sum(r[k] for r in real) / 2 == pytest.approx(said[k])


def test_memory_grows_with_what_is_asked():
    net = tiny()
    sub, total = net.subnet(2, 32, 2, 64), lambda *a, **k: sum(memory(net, *a, **k).values())
    assert total(sub, 1, 32) < total(net.full, 1, 32) < total(net.full, 2, 32) < total(net.full, 2, 32, 'live')
    many = memory(net, net.full, 8, 64), memory(net, net.full, 8, 64, checkpointing=True)
    assert many[1]['activations'] < .7 * many[0]['activations']
    assert sum(reading_memory(net, 4, 64, False).values()) < sum(reading_memory(net, 4, 64).values())


def test_disk_of_a_checkpoint(tmp_path):
    "Weights and two moments in fp32, as Accelerate writes them; the model twice."
    from conftest import write_tokens

    from slm_begin.data import Batches
    from slm_begin.pretrain import TrainConfig, pretrain
    net, tokens = tiny(), write_tokens(tmp_path/'t', 4_000)
    cfg = TrainConfig(tokens=512, seq_len=32, batch_size=8, warmup_steps=1, evals=1, precision='fp32')
    pretrain(net.extract(net.full), Batches(tokens, 32, 8), cfg, tmp_path/'run', say=quiet)
    newest = sorted((tmp_path/'run'/'checkpoints').iterdir())[-1]
    said = disk(net, net.full, 4_000, checkpoints=1)
    assert said['checkpoints'] == pytest.approx(sum(f.stat().st_size for f in newest.rglob('*') if f.is_file()), rel=.1)
    assert said['tokens'] == sum(f.stat().st_size for f in (tmp_path/'t').glob('*.bin'))


# End to end: the recipes themselves, on tiny random checkpoints of the same layout

SHRUNKEN = {'pythia-410m': dict(embd=32, queries=4, ffn=64), 'qwen3-0.3b': dict(embd=32, queries=4, heads=2, head_size=8, ffn=64),
            'smollm-135m': dict(embd=48, queries=6, heads=2, ffn=64)}


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
    from slm_begin.data import load_corpus
    at = tmp_path_factory.mktemp('texts')
    for split in 'train', 'calib', 'valid': (at/f'{split}.txt').write_text(next(iter(load_corpus(split=split)))['text'][:40_000], encoding='utf-8')
    return at


def teacher(name, folder, tok):
    "A tiny random checkpoint with the layout of a recipe's teacher; for Pythia with the real tokenizer, and the vocabulary padded as there."
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    if name.startswith('pythia'):
        if NEOX is None: pytest.skip("the tokenizer of GPT-NeoX (gpt-neox-20b-tokenizer.json in ../shared/data) is not here")
        tok = PreTrainedTokenizerFast(tokenizer_file=str(NEOX), eos_token='<|endoftext|>', bos_token='<|endoftext|>', unk_token='<|endoftext|>')
        assert len(tok) == 50_277
    vocab = 50_432 if name.startswith('pythia') else -(-len(tok) // 64) * 64 + 64
    config = resized(teacher_config(load_recipe(name).teacher)[0], range(4), **SHRUNKEN[name], vocab=vocab)
    config.bos_token_id = config.eos_token_id = tok.eos_token_id
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return model, len(tok)


def small(name, folder, texts, parameters):
    "Flags that shrink sizes and numbers of a recipe, and leave what it does."
    return [f'--teacher={folder}', *(f'--text.{role}={texts/role}.txt' for role in ('train', 'calib', 'valid')), f'--bin.parameters={parameters}',
            '--bin.tolerance=.2', '--space.round_to={embd: 8, heads: 1, ffn: 16}', '--space.at_least={layers: 1}', '--importance.seq_len=32',
            '--importance.windows=4', '--fitness.seq_len=32', '--fitness.windows=6', '--search.budget.evaluations=10', '--search.population=6',
            '--search.elites=4', '--search.niches=2', '--search.finalists=2', '--search.mutate=2', '--search.crossover=1', '--search.immigrants=1',
            '--train.tokens=512', '--train.seq_len=32', '--train.batch_size=8', '--train.micro_batch_size=4', '--train.warmup_steps=1',
            '--train.precision=fp32', '--train.compile=false', '--train.evals=2', '--evaluation.seq_len=32',
            '--evaluation.windows=4', '--samples.tokens=3', '--rerank.part=.01']


@pytest.mark.parametrize('name', SHRUNKEN)
def test_the_whole_recipe_on_a_tiny_teacher(name, tmp_path, texts, tok, monkeypatch):
    monkeypatch.setattr(pipeline, 'html_figure', lambda fig, caption='': '')
    model, entries = teacher(name, tmp_path/'teacher', tok)
    recipe = load_recipe(name, small(name, tmp_path/'teacher', texts, round(.6 * model.num_parameters())))
    page = run(recipe, tmp_path/'run', say=quiet)
    data = json.loads((page.parent/'data.json').read_text())
    assert [a['name'] for a in data['arms']] == ['random', 'one-shot', 'evolved', 'evolved-kd'] and not data['unfinished']
    net = Supernet.from_pretrained(str(tmp_path/'teacher'))
    assert len(net.tokenizer) == entries < net.sizes['vocab']
    assert all(a['parameters'] in recipe.bin.of(net.count(net.full)) for a in data['arms'])
    assert data['arms'][3]['cost']['teacher'] > 0 == data['arms'][2]['cost']['teacher'] and (tmp_path/'run'/'cache'/'manifest.json').exists()
    loaded = Supernet.from_pretrained(str(tmp_path/'run'/'arms'/'evolved-kd'/'final'))
    assert loaded.count(loaded.full) == data['arms'][3]['parameters'] and loaded.tokenizer('To be')['input_ids'] == net.tokenizer('To be')['input_ids']


# Scripts

@pytest.mark.parametrize('script', sorted((root/'runs').glob('*.sh')), ids=lambda p: p.name)
def test_scripts_are_well_formed(script):
    assert subprocess.run(['bash', '-n', script], capture_output=True).returncode == 0
    assert not subprocess.run(['git', 'check-ignore', '-q', script], cwd=root).returncode == 0


def test_a_script_says_what_it_needs():
    for script, what in ('one_node.sh', 'name a recipe'), ('slurm_torchrun.sh', 'this is a job for sbatch'), ('slurm_all.sh', 'name a recipe'):
        done = subprocess.run(['bash', str(root/'runs'/script)], capture_output=True, text=True, env={k: v for k, v in os.environ.items() if 'SLURM' not in k})
        assert done.returncode and what in done.stderr


@pytest.mark.slow
def test_one_node_with_two_processes(tmp_path, texts, tok):
    "The script as it is, with two processes on CPUs, through plan, search, re-ranking, cache, arms and report."
    model, _ = teacher('smollm-135m', tmp_path/'teacher', tok)
    flags = small('smollm-135m', tmp_path/'teacher', texts, round(.6 * model.num_parameters()))
    env = {**os.environ, 'PROCESSES': '2', 'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': 'lo', 'ACCELERATE_USE_CPU': 'true'}
    script = ['bash', str(root/'runs'/'one_node.sh'), 'smollm-135m', str(tmp_path/'run'), *flags]
    done = subprocess.run(script, capture_output=True, text=True, env=env, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path/'run'/'report'/'index.html').exists() and 'report: ' in done.stdout
    again = subprocess.run(script, capture_output=True, text=True, env=env, timeout=200)
    assert again.returncode == 0 and 'finished already' in again.stdout
