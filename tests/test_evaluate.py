"evaluate: what the shipped tasks are, lm-eval against sums by hand, speed and memory, models side by side, and what may be wrong with each."
import importlib.util
import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

from slm_begin.cli import main
from slm_begin.data import OTHERS, SPLITS, assets, load_corpus, load_tokenizer, write_json
from slm_begin.evaluate import (
    LOCAL,
    TASKS,
    compare_table,
    evaluate,
    find_models,
    gains,
    harness,
    load_tasks,
    mean_gain,
    mean_times,
    speed,
    task_items,
    text_figures,
    text_windows,
)
from slm_begin.supernet import Supernet, mean_loss, save_student, token_losses

quiet = lambda line: None
NOVELS = Path(__file__).parents[2] / 'shared' / 'data' / 'novels-valid.parquet'


@pytest.fixture(scope='module')
def net(tok):
    "A tiny random teacher with the embedded tokenizer."
    ids = dict(bos_token_id=tok.eos_token_id, eos_token_id=tok.eos_token_id)
    return Supernet(tiny_model(vocab_size=len(tok), max_position_embeddings=256, noise=0, **ids), tokenizer=tok)


@pytest.fixture(scope='module')
def made(net, tok, tmp_path_factory):
    "A run folder with two finished arms, one of a shape that only the modelling file can say."
    at = tmp_path_factory.mktemp('made')
    save_student(net.model, at/'teacher', tok)
    subs = dict(plain=net.subnet(layers=2), layerwise=net.subnet(layers=[0, 2], heads=(3, 1), ffn=(40, 16)))
    for name, sub in subs.items(): save_student(net.extract(sub), at/'run'/'arms'/name/'final', tok)
    assert (at/'run'/'arms'/'layerwise'/'final'/'modeling_subnet.py').exists()
    write_json(at/'run'/'recipe.yaml', dict(teacher=str(at/'teacher'), arms=[dict(name=n) for n in (*subs, 'unfinished')]))
    return at


@pytest.fixture(scope='module')
def other(tmp_path_factory):
    "A model whose tokens are bytes."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocab = {'<|end|>': 0, **{c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    at = tmp_path_factory.mktemp('bytes')
    save_student(tiny_model(vocab_size=257, max_position_embeddings=256), at, PreTrainedTokenizerFast(tokenizer_object=tok, eos_token='<|end|>'))
    return at


# The shipped tasks

@pytest.mark.parametrize('task', LOCAL)
def test_the_shipped_items(task):
    items, path = task_items(task), assets()/'tasks'/f'{task}.jsonl'
    assert len(items) >= 300 and path.stat().st_size <= 150_000
    for item in items:
        assert [*item] == ['work', 'context', 'choices', 'answer'] and len({*item['choices']}) == 4 and item['answer'] in range(4)
        assert item['context'].strip() and item['context'] == item['context'].rstrip() and all(c == c.strip() for c in item['choices'])
    assert len({(i['context'], *i['choices']) for i in items}) == len(items) and len({i['work'] for i in items}) == 9
    assert len({i['work'] for i in items[:9]}) == 9                                     # the first ones are of all novels
    assert min(Counter(i['answer'] for i in items).values()) > len(items) / 6           # no position is right much more often than others


def test_each_cloze_choice_is_a_word_of_the_passage():
    for item in task_items('cloze'): assert {*item['choices']} <= {*re.findall('[a-z]+', item['context'])}


def test_no_split_holds_an_item():
    "Nothing is trained or tuned on a novel of the tasks; those that hold other parts of it hold no context and no true ending."
    novels = {i['work'] for t in LOCAL for i in task_items(t)}
    told = [i['context'][-80:] for t in LOCAL for i in task_items(t)] + [i['choices'][i['answer']] for i in task_items('endings')]
    for split in SPLITS + OTHERS:
        rows = [*load_corpus(split=split)]
        assert (novels <= {r['id'] for r in rows}) if split in ('valid', 'test') else novels.isdisjoint(r['id'] for r in rows), split
        text = '\n'.join(r['text'] for r in rows if r['id'] in novels)
        assert not [t for t in told if t in text and len(t) > 50], split


@pytest.mark.skipif(not NOVELS.exists(), reason='needs the full novels of ../shared/data')
def test_the_tasks_are_what_the_tool_makes(tmp_path, monkeypatch):
    import pyarrow.parquet as pq
    spec = importlib.util.spec_from_file_location('make_tasks', Path(__file__).parents[1]/'tools'/'make_tasks.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool, 'TASKS', tmp_path)
    books = pq.read_table(NOVELS).to_pylist()
    for make in tool.cloze, tool.endings: tool.write(make.__name__, make, books)
    for task in LOCAL: assert (tmp_path/f'{task}.jsonl').read_bytes() == (assets()/'tasks'/f'{task}.jsonl').read_bytes()


# The harness

@pytest.fixture(scope='module')
def tasks(): return load_tasks(LOCAL)


def test_accuracy_by_hand(net, tok, tasks):
    model, items = net.extract(net.full), {t: task_items(t)[:10] for t in LOCAL}
    model.get_output_embeddings().weight.data.mul_(30)                                  # opinions that rounding does not decide
    def log_prob(context, choice):
        first, then = (tok(t, add_special_tokens=False)['input_ids'] for t in (context, f' {choice}'))
        return -token_losses(model, torch.tensor([(first or [tok.eos_token_id]) + then]))[0, -len(then):].sum().item()
    scores = dict(cloze=lambda i, c: log_prob(i['context'], c), endings=lambda i, c: log_prob(i['context'], c) - log_prob('', c))
    model.train()
    for _ in range(2):                                                                  # the tasks can be used again
        found = harness(model, tok, tasks, limit=10)
        assert model.training
        for t in LOCAL:
            right = [max(range(4), key=lambda k, i=i, t=t: scores[t](i, i['choices'][k])) == i['answer'] for i in items[t]]
            each = torch.tensor(right).double()
            assert found[t] == dict(accuracy=each.mean().item(), stderr=pytest.approx(each.std().item() / 10**.5), n=10, metric=TASKS[t][0], chance=.25)


def test_knowing_the_answers(tok, tasks, monkeypatch):
    "Who gives each true choice the highest probability is right always; the whole of a task is used without `limit`."
    from lm_eval.models.huggingface import HFLM
    right = {(' ' + i['choices'][i['answer']], i['context']) for t in LOCAL for i in task_items(t)}
    monkeypatch.setattr(HFLM, 'loglikelihood', lambda self, requests: [(0. if (r.args[1], r.args[0]) in right else -9., True) for r in requests])
    found = harness(tiny_model(vocab_size=len(tok)), tok, tasks)
    assert [(found[t]['accuracy'], found[t]['stderr'], found[t]['n']) for t in LOCAL] == [(1., 0., len(task_items(t))) for t in LOCAL]


def test_text_is_never_a_template(monkeypatch):
    item = dict(work='x', context='{{ 6 * 7 }} and "', choices=['{{ 1 }}', "['a']", '{% raw %}', '4'], answer=0)
    monkeypatch.setattr('slm_begin.evaluate.task_items', lambda name: [item])
    for task in load_tasks(LOCAL).values():
        doc, = task.test_docs()
        assert (task.doc_to_text(doc), task.doc_to_choice(doc), task.doc_to_target(doc)) == (item['context'], item['choices'], 0)


def test_without_the_harness(net, tok, monkeypatch):
    for name in 'lm_eval', 'lm_eval.tasks': monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"not installed: `pip install 'slm_begin\[eval\]'`, or evaluate without tasks"): load_tasks()
    assert harness(net.model, tok, {}) == {}


def test_without_a_network(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('datasets.config.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('datasets.config.HF_DATASETS_CACHE', tmp_path/'cache')
    for name in [n for n in TASKS if n not in LOCAL]:
        with pytest.raises(ConnectionError, match=f"cannot get the task `{name}` from the Hub, .* Tasks that ship in the package: cloze, endings"):
            load_tasks(['cloze', name])


def test_public_tasks_have_the_metric_that_is_told():
    import lm_eval.tasks
    for name in [n for n in TASKS if n not in LOCAL]:
        files = {f.name: f.read_text(encoding='utf-8') for f in (Path(lm_eval.tasks.__file__).parent/name.split('_')[0]).glob('*.yaml')}
        text, = (t for t in files.values() if re.search(rf'^(task: |  - ){name}$', t, re.M))
        if 'metric:' not in text: text = files[re.search('include: (.*)', text)[1]]
        assert f'metric: {TASKS[name][0]}\n' in text, name


def test_a_public_task(net, tok, monkeypatch):
    "As if it came from the Hub."
    import datasets
    rows = [dict(goal=f'To reach the house number {i}', sol1='go along the road.', sol2='wait until the winter is over.', label=i % 2) for i in range(6)]
    splits = datasets.DatasetDict({s: datasets.Dataset.from_list(rows) for s in ('train', 'validation')})
    monkeypatch.setattr('datasets.load_dataset', lambda path, **kw: splits)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)               # so that nobody asks the Hub
    found = harness(net.model, tok, ['piqa', 'cloze'], limit=4)
    assert [*found] == ['piqa', 'cloze'] and found['piqa']['n'] == 4 and found['piqa']['chance'] == .5 and found['piqa']['accuracy'] in (0, .25, .5, .75, 1)


def test_importing_the_chapter_needs_no_harness():
    program = "import sys, slm_begin.evaluate; sys.exit(bool({'lm_eval', 'datasets', 'matplotlib'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, '-c', program]).returncode == 0


# Speed

def test_speed_and_memory(net):
    sub = net.extract(net.subnet(layers=[0, 2], heads=(3, 1), ffn=(40, 16))).train()
    found = speed(dict(teacher=net.model, sub=sub), prompt=20, new=5, batch_size=2, rounds=2)
    head, tokens = 8, 2 * 25
    assert [found[n]['cache_bytes'] for n in ('teacher', 'sub')] == [2 * heads * head * tokens * 4 for heads in (3 * 4, 3 + 1)]
    assert found['sub']['weight_bytes'] == 4 * sub.num_parameters() and sub.training
    assert all(r['prompt'] > 0 and r['decode'] > 0 and r['peak_bytes'] is None for r in found.values())
    half = speed(dict(half=net.extract(net.full).to(torch.bfloat16)), prompt=20, new=5, batch_size=2, rounds=1)['half']
    assert half['weight_bytes'] * 2 == found['teacher']['weight_bytes'] and half['cache_bytes'] * 2 == found['teacher']['cache_bytes']
    assert speed({}) == {}


def test_speed_counts_tokens(net, monkeypatch):
    "Medians of seconds, not of speeds; the round that warms up does not count."
    seconds = iter([(9., 9., 1, None), (2., 4., 1, None), (1., 1., 1, None), (4., 8., 1, None)])
    monkeypatch.setattr('slm_begin.evaluate._generate_timed', lambda model, ids, new: next(seconds))
    found = speed(dict(m=net.model), prompt=10, new=6, batch_size=3, rounds=3)['m']
    assert (found['prompt'], found['decode']) == (3 * 10 / 2, 3 * 6 / 4)


def test_decoding_is_greedy_generation(net):
    "What is timed is what `generate` does."
    from slm_begin import evaluate as chapter
    ids, fed = torch.arange(7)[None] + 50, []
    hook = net.model.register_forward_pre_hook(lambda m, args, kw: fed.append(kw['input_ids']), with_kwargs=True)
    chapter._generate_timed(net.model, ids, 6)
    hook.remove()
    out = net.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.cat(fed[1:], 1).tolist() == out[:, 7:].tolist()


@pytest.mark.cuda
def test_speed_on_a_gpu(net):
    model = net.extract(net.full).to('cuda', torch.bfloat16)
    r = speed(dict(m=model), prompt=64, new=8, rounds=2)['m']
    assert r['peak_bytes'] >= r['weight_bytes'] + r['cache_bytes'] and r['prompt'] > 0 and r['decode'] > 0


# Side by side

def test_what_paths_mean(made, tmp_path, monkeypatch):
    run, final = made/'run', made/'run'/'arms'
    assert find_models([run]) == dict(teacher=str(made/'teacher'), plain=str(final/'plain'/'final'), layerwise=str(final/'layerwise'/'final'))
    assert find_models(['embedded', 'owner/name', made/'teacher']) == {n: n for n in ('embedded', 'owner/name', str(made/'teacher'))}
    assert [*find_models([run, 'embedded'])] == ['run/teacher', 'run/plain', 'run/layerwise', 'embedded']
    assert len(find_models([run, made/'teacher', run])) == 3                                                # each model once
    twin = tmp_path/'run'                                                                                   # another run of the same name
    save_student(tiny_model(), twin/'arms'/'plain'/'final')
    write_json(twin/'recipe.yaml', dict(teacher='embedded', arms=[dict(name='plain')]))
    assert [*find_models([run, twin])] == ['run/teacher', 'run/plain', 'run/layerwise', 'embedded', str(twin/'arms'/'plain'/'final')]
    trained = tmp_path/'teacher-run'                                                                        # of train-teacher
    save_student(tiny_model(), trained/'model')
    write_json(trained/'recipe.yaml', dict(model={}))
    assert find_models([trained]) == dict(model=str(trained/'model'))
    monkeypatch.chdir(made)
    assert find_models(['teacher']) == dict(teacher='teacher')


def test_figures_of_models(made, net, tok, tmp_path):
    data = evaluate([made/'run'], ['valid', 'manual'], [], windows=6, seq_len=64, measure_speed=True, say=quiet)
    assert data['same_tokenizer'] and data['tasks'] == {} and 'lm_eval' not in data['versions'] and json.loads(json.dumps(data)) == data
    subs = dict(teacher=net.full, plain=net.subnet(layers=2), layerwise=net.subnet(layers=[0, 2], heads=(3, 1), ffn=(40, 16)))
    for row, (name, sub) in zip(data['models'], subs.items(), strict=True):
        assert (row['name'], row['parameters'], row['tasks']) == (name, net.count(sub), {}) and row['speed']['decode'] > 0
        for text, figures in row['texts'].items():
            windows = text_windows(text, tok, 64, 6, tmp_path/name/text, quiet)
            each = token_losses(net.extract(sub), windows).double().mean(1)
            assert figures['loss'] == pytest.approx(mean_loss(net.extract(sub), windows), abs=1e-6)
            assert figures['stderr'] == pytest.approx(each.std().item() / 6**.5, abs=1e-6) and figures['perplexity'] == pytest.approx(math.exp(figures['loss']))
    table = compare_table(data)
    head, _, *rows = table.split('\n\n')[0].splitlines()
    assert re.split('  +', head) == ['model', 'parameters', 'valid ppl', 'manual ppl', 'prompt tok/s', 'decode tok/s', 'weights MB', 'cache MB']
    assert [r.split()[0] for r in rows] == [*subs] and 'guessing' not in table and 'valid: 6 windows of 64 tokens' in table


def test_a_file_of_ones_own_and_tasks(made, tmp_path):
    text = next(iter(load_corpus(split='calib')))['text']
    (tmp_path/'mine.txt').write_text(text[:20_000], encoding='utf-8')
    data = evaluate([made/'teacher'], [str(tmp_path/'mine.txt')], ['cloze'], limit=3, windows=4, seq_len=32, say=quiet)
    row, = data['models']
    assert row['tasks']['cloze']['n'] == 3 and row['speed'] is None and data['tasks'] == dict(cloze=.25)
    lines = compare_table(data).splitlines()
    assert 'mine.txt ppl' in lines[0] and 'cloze %' in lines[0] and ' ± ' in lines[2] and re.fullmatch(r'\(guessing\) +25\.0', lines[3])


def test_different_tokenizers(made, other):
    "Per byte: a perplexity of one is not that of the other."
    data = evaluate([made/'teacher', other], ['valid'], [], windows=8, seq_len=128, say=quiet)
    assert not data['same_tokenizer']
    lines = compare_table(data).splitlines()
    assert 'valid bits/byte' in lines[0] and 'ppl' not in lines[0] and 'The tokenizers differ' in lines[-1]
    for line, m in zip(lines[2:], data['models']): assert line.endswith(f"{m['texts']['valid']['bits_per_byte']:.3f}")
    ours, theirs = (m['texts']['valid'] for m in data['models'])
    assert theirs['bits_per_byte'] == pytest.approx(theirs['loss'] / math.log(2), rel=.01)       # a byte a token, but for what ends documents
    assert ours['bits_per_byte'] < .5 * ours['loss'] / math.log(2)


def test_bits_a_byte(tok, other, tmp_path):
    "One of 256 bytes, each as likely as any other, is 8 bits, whatever the script; what ends a document has no bytes."
    bytes_, text = load_tokenizer(str(other)), 'Ein Gespräch über “Wärme” – и ещё 温度. '
    ids = torch.tensor([[0] + bytes_(text, add_special_tokens=False)['input_ids']])
    losses = torch.full((1, ids.shape[1] - 1), math.log(256))
    assert losses.numel() == len(text.encode()) and text_figures(losses, ids, bytes_)['bits_per_byte'] == pytest.approx(8, abs=1e-5)
    assert text_figures(losses, ids, bytes_)['stderr'] is None
    ended = torch.cat([ids, torch.zeros(1, 1, dtype=torch.long)], 1)
    assert text_figures(torch.cat([losses, torch.zeros(1, 1)], 1), ended, bytes_)['bits_per_byte'] == pytest.approx(8, abs=1e-5)


@pytest.mark.parametrize('settings, message', [
    (dict(paths=[]), 'name at least one model'),
    (dict(paths=['./nothing']), 'model `./nothing`: no such folder'),
    (dict(paths=['{tmp}']), 'is neither a checkpoint .no config.json. nor a run folder .no recipe.yaml.'),
    (dict(paths=['{tmp}/begun']), 'has no finished model yet'),
    (dict(paths=['{tmp}/nothing.txt']), 'no such folder'),
    (dict(texts=['valdi']), 'there is no text `valdi`: name train, calib, valid, test, bible, manual'),
    (dict(texts=['{tmp}/nothing.txt']), 'no such file or folder'),
    (dict(texts=['{tmp}/empty.txt']), 'is empty'),
    (dict(texts=['{tmp}/tiny.txt']), r'the text `.*tiny.txt` has \d+ tokens, which are 0 windows of 32, fewer than 4'),
    (dict(tasks=['clozé']), 'there is no task `clozé`: choose among cloze, endings'),
    (dict(limit=1), '`limit` is 1; a standard error needs at least 2 items'),
    (dict(windows=0), 'both must be at least 1'),
    (dict(seq_len=-1), 'both must be at least 1'),
    (dict(seq_len=300), 'the context of `.*` is 256 tokens'),
    (dict(precision='int8'), "`precision` is 'int8'; choose one of auto, fp32, bf16"),
])
def test_wrong_settings(settings, message, made, tmp_path):
    (tmp_path/'empty.txt').touch()
    (tmp_path/'tiny.txt').write_text('Too short.', encoding='utf-8')
    write_json(tmp_path/'begun'/'recipe.yaml', dict(teacher='embedded', arms=[dict(name='random')]))
    fill = lambda v: [s.replace('{tmp}', str(tmp_path)) for s in v] if isinstance(v, list) else v
    settings = {**dict(paths=[str(made/'teacher')], tasks=[], windows=4, seq_len=32, say=quiet), **{k: fill(v) for k, v in settings.items()}}
    with pytest.raises((ValueError, OSError), match=message): evaluate(**settings)


def test_a_tokenizer_of_another_model(tok, tmp_path):
    save_student(tiny_model(vocab_size=64), tmp_path/'m', tok)
    with pytest.raises(ValueError, match=r'tokenizer of `.*m` gives the id \d+, but its model knows 64 tokens'):
        evaluate([tmp_path/'m'], ['valid'], [], windows=2, seq_len=32, say=quiet)


def test_no_tokenizer(tmp_path):
    save_student(tiny_model(), tmp_path/'m')
    with pytest.raises(ValueError, match='m` has no tokenizer'): evaluate([tmp_path/'m'], ['valid'], [], say=quiet)


def test_broken_weights(made, tok, tmp_path):
    model = tiny_model(vocab_size=len(tok))
    model.get_output_embeddings().weight.data[3] = math.nan
    save_student(model, tmp_path/'m', tok)
    with pytest.raises(ValueError, match='has a loss of nan on the text `valid`: its weights are broken'):
        evaluate([tmp_path/'m'], ['valid'], [], windows=2, seq_len=32, say=quiet)


def test_command(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = '--texts valid --tasks cloze --limit 2 --windows 3 --seq_len 32 --out new/figures.json'
    assert main(['evaluate', str(made/'run'), *settings.split()]) == 0
    out, data = capsys.readouterr().out, json.loads((tmp_path/'new'/'figures.json').read_text(encoding='utf-8'))
    assert compare_table(data) in out and out.endswith('done: new/figures.json\n') and [m['name'] for m in data['models']] == ['teacher', 'plain', 'layerwise']
    assert main(['evaluate', str(made/'teacher'), 'embedded', '--texts', '', '--tasks', '']) == 0
    assert len(capsys.readouterr().out.split('\n\n')[1].splitlines()) == 4


@pytest.mark.parametrize('args, message', [
    ('', 'name at least one model'), ('embedded --texts valdi', 'there is no text `valdi`'), ('embedded --tasks squad', 'there is no task `squad`'),
    ('embedded --out .', '`.` is a folder; name a file'), ('embedded --limit many', "`limit` is 'many'"), ('embedded --sped', 'did you mean `--speed`?'),
])
def test_command_errors(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['evaluate', *args.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith('slm_begin: ') and message in err and err.count('\n') == 1 and not [*tmp_path.iterdir()]


def test_means_of_gains():
    "Geometric; never if one never gets there; a lower bound where some, but not all, are there at once."
    read = lambda *told: gains([dict(tokens_gain=g) for g in told])
    assert mean_gain(read(2., 8.)) == pytest.approx(4) and mean_gain(read(2., None)) == 0 == mean_gain(read('at once', None))
    assert mean_gain(read('at once', 'at once')) == math.inf and mean_gain(read('at once', 2., 8.)) == pytest.approx((8 * 2 * 8)**(1 / 3))
    assert [mean_times(read(*told)) for told in ((2., 8.), ('at once', 2., 8.), ('at once',), (2., None))] == ['4.00×', '≥5.04×', 'at once', 'never']
