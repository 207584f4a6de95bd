"pipeline: recipes and what may be wrong with them, runs that are killed and go on, damaged files, the account, the report, teachers."
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace

import pytest
import torch
from conftest import tiny_model

from slm_begin import pipeline
from slm_begin.data import read_lines
from slm_begin.importance import Importance
from slm_begin.pipeline import (
    Arm,
    Recipe,
    TeacherRecipe,
    check,
    claim,
    collect,
    load_recipe,
    make_report,
    plan,
    recipe_yaml,
    recipes,
    run,
    train_teacher,
)
from slm_begin.pretrain import Stopped
from slm_begin.search import extrapolate
from slm_begin.supernet import Subnet

quiet = lambda line: None


@pytest.fixture(scope='session')
def made(tmp_path_factory, tok):
    "A tiny random teacher with the embedded tokenizer, and three small texts."
    from slm_begin.data import load_corpus
    at = tmp_path_factory.mktemp('made')
    model = tiny_model(vocab_size=len(tok), hidden_size=64, intermediate_size=128, noise=0, bos_token_id=tok.eos_token_id, eos_token_id=tok.eos_token_id)
    model.save_pretrained(at/'teacher')
    tok.save_pretrained(at/'teacher')
    for split in 'train', 'calib', 'valid': (at/f'{split}.txt').write_text(next(iter(load_corpus(split=split)))['text'][:40_000], encoding='utf-8')
    return at


@pytest.fixture(scope='session')
def flags(made):
    "Settings that make the recipe `tiny` a matter of a few seconds."
    return [f'--teacher={made/"teacher"}', *(f'--text.{s}={made/s}.txt' for s in ('train', 'calib', 'valid')), '--space.round_to={embd: 8, ffn: 16}',
            '--train.seq_len=32', '--train.tokens=2048', '--train.checkpoint_every=2 steps', '--train.warmup_steps=1', '--samples.tokens=4',
            '--bin.fraction=.5', '--bin.tolerance=.1']


@pytest.fixture(scope='session')
def recipe(flags): return load_recipe('tiny', flags)


@pytest.fixture(scope='session')
def whole(recipe, tmp_path_factory):
    "A finished run."
    out = tmp_path_factory.mktemp('whole')/'run'
    run(recipe, out, say=quiet)
    return out


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    "Drawing takes longer than everything else in a run this small; `whole` is made before this, with all of its figures."
    monkeypatch.setattr(pipeline, 'html_figure', lambda fig, caption='': '')


def ends(folder):
    "What must not depend on how often a run was killed."
    lines = lambda name: [(line['key'], line['loss']) for line in read_lines(folder/'search'/name)]
    weights = {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob('arms/*/*/model.safetensors')}
    evals = {f.parent.name: [(m['step'], m['valid_loss']) for m in read_lines(f) if 'valid_loss' in m] for f in folder.glob('arms/*/metrics.jsonl')}
    ranked = [{k: v for k, v in line.items() if k != 'seconds'} for line in read_lines(folder/'search'/'rerank.jsonl')]
    return lines('history.jsonl'), lines('random/history.jsonl'), ranked, weights, evals

def finalists(folder):
    found = json.loads((folder/'search'/'result.json').read_text(encoding='utf-8'))['finalists']
    return [Subnet.from_json(f['subnet']) for f in found]


# Recipes

def test_recipes_of_the_package():
    assert {'demo', 'tiny', 'teacher'} <= set(recipes())
    for name in recipes():
        if name.startswith('study'): continue                           # a study's: tests/test_study.py
        cls = TeacherRecipe if name.startswith('teacher') else Recipe
        assert load_recipe(name, cls=cls) == load_recipe(recipes()[name], cls=cls)


@pytest.mark.parametrize('name, cls', [('demo', Recipe), ('teacher', TeacherRecipe)])
def test_recipe_round_trip(name, cls, tmp_path):
    r = load_recipe(name, cls=cls)
    (tmp_path/'r.yaml').write_text(recipe_yaml(r), encoding='utf-8')
    assert load_recipe(tmp_path/'r.yaml', cls=cls) == r


def test_every_setting_is_told(tmp_path):
    "Each setting that the help lists can be set, and the help says what the comment beside the field says."
    text = ' '.join(pipeline.recipe_parser().format_help().split())
    for f in fields(Recipe): assert f'--{f.name}' in text
    assert "The bin's centre, as a part of the teacher's parameters (type: float, default: 0.3)" in text
    assert 'Peak learning rate (type: float' in text


@pytest.mark.parametrize('text, message', [
    ('trian: {lr: 1e-3}', 'there is no setting `trian`: did you mean `train`?'),
    ('train: {lrr: 1e-3}', 'there is no setting `train.lrr`: did you mean `train.lr`?'),
    ('search: {popluation: 3}', 'did you mean `search.population`?'),
    ('arms: [{name: a, strat: random}]', 'there is no setting `arms.0.strat`: did you mean `arms.0.start`?'),
    ('arms: [{start: random}]', 'the setting `arms.0.name` is missing'),
    ('arms: {name: a}', '`arms` is {\'name\': \'a\'}; it must be a list'),
    ('arms: []', '`arms` is empty'),
    ('arms: [{name: a}, {name: a}]', 'two arms are called `a`'),
    ('arms: [{name: a, start: pruned}]', "`arms.0.start` is 'pruned'; choose one of random, one-shot, first-layers, random-search, evolved"),
    ('arms: [{name: ../a}]', 'it names a folder'),
    ('arms: [{name: a, alpha: 0, beta: 0}]', '`arms.0.alpha` and `beta` are both 0'),
    ('arms: [{name: a, lr: 7}]', '`arms.0.lr` is 7.0; it must lie between 0 and 1'),
    ('train: {lr: fast}', "`train.lr` is 'fast'; it must be of the type float"),
    ('train: {lr: -1}', '`train.lr` is -1.0; it must lie between 0 and 1'),
    ('train: {schedule: steps}', "`train.schedule` is 'steps'; choose one of wsd, cosine, linear, constant"),
    ('train: 3', '`train` is 3; it must be a mapping of settings'),
    ('bin: {fraction: 1.5}', '`bin.fraction` is 1.5; it must lie between 0 and 1'),
    ('bin: {tolerance: .nan}', '`bin.tolerance` is nan; it must lie between 0 and 0.5'),
    ('space: {granularity: finest}', 'choose one of coarse-uniform, coarse-layerwise, fine-uniform, fine-layerwise'),
    ('space: {round_to: {layers: 2}}', '`space.round_to` is'),
    ('space: {at_least: {depth: 2}}', '`space.at_least` is'),
    ('space: {score: best}', "`space.score` is 'best'; choose one of default, wanda"),
    ('fitness: {windows: 0}', '`fitness.windows` is 0; it must be at least 1'),
    ('search: {elites: 99}', '`search.elites` is 99; it must not exceed'),
    ('text: {train: a.txt, calib: a.txt}', '`text.train`, `calib` and `valid` must be different texts; `a.txt` is given twice'),
    ('samples: {temperature: -1}', '`samples.temperature` is -1.0; it must lie between 0 and 10'),
    ('a: b: c', 'is not readable YAML'),
    ('[1, 2]', 'it must be a mapping of settings'),
    ('model: {embd: 8}', 'it is a recipe for `slm_begin train-teacher`'),
])
def test_recipe_refused(text, message, tmp_path):
    (tmp_path/'r.yaml').write_text(text, encoding='utf-8')
    with pytest.raises(ValueError, match=re.escape(message)): load_recipe(tmp_path/'r.yaml')


def test_recipe_missing_or_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match='neither as a file nor in the package: did you mean `demo`'): load_recipe('dmeo')
    (tmp_path/'empty.yaml').write_text('', encoding='utf-8')
    assert load_recipe(tmp_path/'empty.yaml') == Recipe()
    (tmp_path/'latin.yaml').write_bytes(b'title: caf\xe9')
    with pytest.raises(ValueError, match='not readable YAML'): load_recipe(tmp_path/'latin.yaml')


def test_flags_over_file():
    r = load_recipe('tiny', ['--train.lr=1e-4', '--arms=[{"name": "a", "start": "random"}]', '--space.round_to.embd=8', '--text.max_tokens', 'null'])
    assert (r.train.lr, r.arms, r.space.round_to['embd'], r.text.max_tokens) == (1e-4, [Arm('a', start='random')], 8, None)
    with pytest.raises(ValueError, match='there is no flag `--train.lrr`: did you mean `--train.lr`?'): load_recipe('tiny', ['--train.lrr=1'])
    with pytest.raises(ValueError, match='unexpected argument'): load_recipe('tiny', ['something'])


def test_teacher_recipe_is_what_the_embedded_teacher_was_trained_with():
    r = load_recipe('teacher', cls=TeacherRecipe)
    a, t = r.model, r.train
    assert (a.embd, a.layers, a.heads, a.ffn, a.context, a.rotary) == (256, 6, 8, 1024, 512, .25)
    assert t.tokens >= 30_000_000 and (t.seq_len, t.batch_size, t.lr, t.schedule) == (512, 8, 2e-3, 'wsd')


# Bad input, before long work

@pytest.mark.parametrize('change, message', [
    (['--teacher=/no/such/folder'], 'model `/no/such/folder`: no such folder'),
    (['--teacher={at}/broken'], 'no model can be read from'),
    (['--text.train=no/such/file.txt'], 'corpus `no/such/file.txt`: no such file or folder'),
    (['--text.train={at}/short.txt'], '`text.train`: `{at}/short.txt` holds'),
    (['--text.train={at}/short.txt'], 'too few for one batch of 8 windows of 32 tokens (`train`), which need 257'),
    (['--text.calib={at}/short.txt'], 'too few for 4 calibration windows of 64 tokens (`importance`), which need 257'),
    (['--text.valid={at}/short.txt'], 'too few for 4 windows of 64 tokens (`evaluation`)'),
    (['--text.train={at}/oops.parquet'], 'cannot be read'),
    (['--text.train={at}/oops.jsonl'], 'cannot be read'),
    (['--text.column=body'], 'has no column `body`'),
    (['--bin.fraction=.01', '--bin.tolerance=.01'], 'Reachable are'),
    (['--train.seq_len=4096'], '`train.seq_len` is 4096; the teacher'),
    (['--fitness.seq_len=65'], '`fitness.seq_len` is 65; the teacher'),
    (['--samples.tokens=64'], '`samples.tokens` is 64; the teacher'),
    (['--text.max_tokens=100'], '`text.max_tokens` is 100; one batch alone needs 257'),
    (['--space.round_to.embd=65'], '`round_to` has embd=65'),
    (['--space.max_aspect=1'], '`max_aspect` is 1'),
    (['--space.head_sizes=[17]'], '`head_size`: cannot keep 17'),
    (['--space.query_heads=[2]'], '`queries` of layer 0: cannot keep 2'),
])
def test_check_refuses(change, message, flags, tmp_path):
    (tmp_path/'short.txt').write_text('Too short.', encoding='utf-8')
    (tmp_path/'oops.parquet').write_bytes(b'oops')
    (tmp_path/'oops.jsonl').write_text('{"text": \n', encoding='utf-8')
    (tmp_path/'broken').mkdir()
    (tmp_path/'broken'/'config.json').write_text('{', encoding='utf-8')
    out = tmp_path/'run'
    with pytest.raises((ValueError, OSError), match=re.escape(message.replace('{at}', str(tmp_path)))):
        run(load_recipe('tiny', flags + [c.replace('{at}', str(tmp_path)) for c in change]), out, say=quiet)
    assert not (out/'recipe.yaml').exists()                      # so that the corrected recipe can go into the same folder


def test_hub_without_network(flags, monkeypatch):
    "No network: said at once, not after half a minute of retries, and the embedded default is named."
    from huggingface_hub import constants

    from slm_begin.data import hub_or_cache
    for k in 'HTTPS_PROXY', 'https_proxy', 'ALL_PROXY', 'all_proxy': monkeypatch.delenv(k, raising=False)
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    start = time.perf_counter()
    for change in '--teacher=nobody/no-such-model', '--text.train=nobody/no-such-text:train':
        with pytest.raises(ConnectionError, match='ships in the package: `embedded`'): check(load_recipe('tiny', [*flags, change]))
    assert time.perf_counter() - start < 20
    with hub_or_cache('embedded'): assert not constants.HF_HUB_OFFLINE


def test_tokenizer_must_fit(flags, made, tmp_path):
    shutil.copytree(made/'teacher', tmp_path/'teacher')
    tiny_model(vocab_size=100).save_pretrained(tmp_path/'teacher')
    with pytest.raises(ValueError, match='has 4,096 entries, its model 100: they do not belong together'):
        check(load_recipe('tiny', [*flags, f'--teacher={tmp_path/"teacher"}']))


def test_text_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pipeline.text_source('embedded', 'calib') == ('embedded', 'calib')
    assert pipeline.text_source('owner/name:validation', 'calib') == ('owner/name', 'validation')
    assert pipeline.text_source('owner/name', 'calib') == ('owner/name', 'train')
    (tmp_path/'a:b.txt').write_text('x')
    assert pipeline.text_source('a:b.txt', 'valid') == ('a:b.txt', 'train')


# A run

def test_run_folder(whole, recipe):
    for name in ('recipe.yaml', 'environment.json', 'log.txt', 'data/train/manifest.json', 'teacher.json', 'importance.safetensors', 'search/history.jsonl',
                 'search/result.json', 'account.json', 'report/index.html', 'report/data.json'): assert (whole/name).exists(), name
    for arm in recipe.arms:
        for name in 'initial/model.safetensors', 'initial/README.md', 'final/tokenizer.json', 'final/generation_config.json', 'metrics.jsonl', 'samples.json':
            assert (whole/'arms'/arm.name/name).exists(), name
    assert not list(whole.rglob('*.partial')) and not list(whole.rglob('*.tmp'))
    log = (whole/'log.txt').read_text(encoding='utf-8')
    assert re.search(r'^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[1/11\] text into tokens  \(about 0:0\d:\d\d left in all\)$', log, re.M)
    assert 'tokens/s' in log and '[11/11] report:' in log


def test_model_cards_tell_the_lineage(whole, recipe):
    for arm in recipe.arms:
        card, facts = (whole/'arms'/arm.name/'final'/'README.md').read_text(encoding='utf-8'), json.loads((whole/'arms'/arm.name/'arm.json').read_text())
        assert f"| layers of the teacher | {facts['sizes']['layers']} |" in card and f"| learning rate | {facts['lr']} |" in card and 'perplexity' in card
        assert (json.dumps(facts['subnet']) in card)==(arm.start!='random') and card.count('Teacher: ')==1


def test_arms_see_the_same_tokens_in_the_same_order(whole):
    runs = [json.loads(f.read_text()) for f in whole.glob('arms/*/run.json')]
    assert len(runs) == 4 and all(r['data'] == runs[0]['data'] and r['train'] == runs[0]['train'] for r in runs)
    initial = lambda name: (whole/'arms'/name/'initial'/'model.safetensors').read_bytes()
    assert initial('evolved') == initial('evolved-kd') != initial('one-shot')


def test_account_is_all_in(whole, recipe):
    "Each arm pays for what it needed, by the closed form."
    data = json.loads((whole/'report'/'data.json').read_text(encoding='utf-8'))
    net = check(recipe).supernet
    full, tokens = net.flops(net.full, 32), 2048
    paid = data['account']
    long, one, two = (net.flops(net.full, t) for t in (64, 1, 2))
    assert paid['importance']['flops'] == 4 * 64 * (3 * long - (2 * one - two))     # gradients cost as much as matrices and twice as much as attention
    assert paid['search']['flops'] >= data['search']['evolve'][-1]['total_flops'] >= sum(h['flops'] for h in data['search']['evolve'])
    assert paid['random_search']['flops'] <= paid['search']['flops']
    assert paid['rerank']['flops'] == sum(3 * 32 * 8 * 4 * net.flops(s, 32) + 4 * 128 * net.flops(s, 64) for s in finalists(whole))
    assert paid['search']['evaluations'] <= recipe.search.evaluations           # no candidate is measured twice
    for arm in data['arms']:
        student = json.loads((whole/'arms'/arm['name']/'arm.json').read_text())['flops_per_token']
        assert arm['cost'] == dict(importance=0 if arm['start'] == 'random' else paid['importance']['flops'], student=3 * student * tokens,
                                   search=paid['search']['flops'] + paid['rerank']['flops'] if arm['start'] == 'evolved' else 0,
                                   teacher=full * tokens if arm['objective'] == 'kd' else 0)
        assert arm['curve'][0]['flops'] == arm['cost']['importance'] + arm['cost']['search'] and arm['curve'][-1]['flops'] == sum(arm['cost'].values())
        assert data['bin']['low'] <= arm['parameters'] <= data['bin']['high']
    first = data['arms'][0]
    assert first['tokens_to_match'] == first['curve'][-1]['tokens'] == tokens


def test_plan_agrees_with_the_run(whole, recipe):
    p = plan(recipe)
    data = collect(whole)
    planned = {row['stage']: row for row in p.rows}
    assert [*planned] == ['data', 'teacher', 'importance', 'search', 'rerank', 'random search', *(f'arm {a.name}' for a in recipe.arms), 'report']
    assert planned['importance']['flops'] == data['account']['importance']['flops']
    one = lambda a: a['flops'] / a['tokens']
    assert planned['search']['tokens'] >= data['account']['search']['tokens'] and abs(one(planned['search']) / one(data['account']['search']) - 1) < .2
    assert p.seconds > 0 and .5 < p.memory_gb < 3 and str(p).endswith('of memory on this machine')


def test_the_evolved_arm_starts_from_what_promises_most(whole, recipe):
    "Of the finalists, one a depth, the one whose learning curve ends lowest; and it is worth what `extrapolate` says."
    told = json.loads((whole/'search'/'reranked.json').read_text(encoding='utf-8'))
    floor = .75 * json.loads((whole/'teacher.json').read_text(encoding='utf-8'))['valid_loss']
    predicted = [extrapolate(f['curve'], recipe.train.tokens, floor) for f in told['finalists']]
    assert predicted == sorted(predicted) == [f['predicted'] for f in told['finalists']]
    depths = [len(s.layers) for s in finalists(whole)]
    assert len({*depths}) == len(depths) > 1 and [t for t, _ in told['finalists'][0]['curve']] == [0, 256, 512, 1024]
    assert json.loads((whole/'arms'/'evolved'/'arm.json').read_text(encoding='utf-8'))['subnet'] == told['subnet']


def test_starts_of_other_kinds(recipe, tmp_path):
    "The first layers cost nothing to find; the best of random draws costs what the search has cost."
    arms = [Arm('a', start='first-layers'), Arm('b', start='random-search')]
    run(replace(recipe, arms=arms, random_search=False), tmp_path/'run', say=quiet)
    data = collect(tmp_path/'run')
    first, drawn = data['arms']
    assert first['sizes']['layers'] == [*range(len(first['sizes']['layers']))] and first['cost']['search'] == first['cost']['importance'] == 0
    assert drawn['cost']['search'] == data['account']['random_search']['flops'] and drawn['cost']['importance'] > 0 and 'rerank' not in data['account']
    assert drawn['sizes'] == json.loads((tmp_path/'run'/'search'/'random'/'result.json').read_text(encoding='utf-8'))['sizes']


def test_best_of_n_random_costs_what_the_evolved_start_costs(recipe, tmp_path):
    "An arm that starts from random candidates may read for as many FLOPs as search and re-ranking together."
    run(replace(recipe, arms=[Arm('a', start='random-search'), Arm('b', start='evolved')], random_search=False), tmp_path/'run', say=quiet)
    drawn, evolved = collect(tmp_path/'run')['arms']
    paid = collect(tmp_path/'run')['account']
    per = 2 * 64 * max(h['flops'] / h['tokens'] for h in collect(tmp_path/'run')['search']['random'])        # the last candidate may not fit any more
    assert evolved['cost']['search'] - 16 * per < drawn['cost']['search'] <= evolved['cost']['search'] == paid['search']['flops'] + paid['rerank']['flops']


def test_a_part_of_a_run_and_then_the_rest(recipe, whole, tmp_path):
    out = tmp_path/'run'
    assert run(recipe, out, say=quiet, part='search') == out and (out/'search'/'reranked.json').exists() and not (out/'arms').exists()
    run(None, out, resume=True, say=quiet, part='pretrain', only=['evolved'])
    assert [f.parent.name for f in out.glob('arms/*/final')] == ['evolved']
    said = []
    run(None, out, resume=True, say=said.append, part='pretrain')
    assert said[0] == '7 of 10 stages are finished already' and not (out/'report').exists()
    assert run(None, out, resume=True, say=quiet).exists() and ends(out) == ends(whole)


def test_parts_that_are_not_there(recipe, tmp_path):
    for message, r, kw in [('no arm of this recipe starts from a search', replace(recipe, arms=[Arm('a', start='one-shot')]), dict(part='search')),
                           ('no arm of this recipe learns from a cached teacher', recipe, dict(part='cache')),
                           ('there is no arm `evolvd` in this recipe: did you mean `evolved`', recipe, dict(part='pretrain', only=['evolvd'])),
                           ("`part` is 'serach'; choose one of run, search, cache, pretrain", recipe, dict(part='serach'))]:
        with pytest.raises(ValueError, match=message): run(r, tmp_path/'run', say=quiet, **kw)


def test_arms_as_jobs_of_their_own(recipe, whole, tmp_path):
    "Two processes train an arm each, at the same time and in the same folder; none of them loses what the other enters into the account."
    out = tmp_path/'run'
    run(recipe, out, say=quiet, part='search')
    jobs = [subprocess.Popen([sys.executable, '-m', 'slm_begin', 'pretrain', '--resume', '--out', str(out), '--only', arm],
                             env={**os.environ, 'OMP_NUM_THREADS': '1'}, stdout=subprocess.DEVNULL) for arm in ('random', 'one-shot')]
    assert [j.wait(timeout=120) for j in jobs] == [0, 0]
    account = json.loads((out/'account.json').read_text(encoding='utf-8'))
    assert {'arm random', 'arm one-shot'} < {*account['finished']} and {'arm random', 'arm one-shot'} < {*account['seconds']}


CACHED = Arm('cached', start='one-shot', objective='kd', teacher='cached')

def test_an_arm_with_a_cached_teacher(recipe, tmp_path):
    "The teacher's reading is paid token by token, as with a live one; what all arms see is the same."
    r = replace(recipe, arms=[Arm('ce', start='one-shot'), CACHED], random_search=False)
    run(r, tmp_path/'run', say=quiet)
    data = collect(tmp_path/'run')
    ce, cached = data['arms']
    made = json.loads((tmp_path/'run'/'account.json').read_text())['cache']
    assert made['tokens'] == 2048 and cached['cost'] == {**ce['cost'], 'teacher': made['flops']} and ce['cost']['teacher'] == 0
    for a, b in zip(cached['curve'], ce['curve'], strict=True): assert a['flops'] == b['flops'] + made['flops'] * a['tokens'] / 2048
    assert cached['seconds']['cache'] == made['seconds']
    assert 'kl' in [*filter(lambda m: 'loss' in m, read_lines(tmp_path/'run'/'arms'/'cached'/'metrics.jsonl'))][0]
    planned = {row['stage']: row for row in plan(r).rows}
    assert planned['cache']['flops'] == made['flops'] and planned['arm cached']['flops'] < planned['arm ce']['flops'] * 1.01


@pytest.mark.slow
def test_a_run_by_two_processes(recipe, whole, tmp_path):
    "Started by torchrun (`accelerate launch` starts several only on GPUs): the same search to the bit, and trainings that agree to rounding."
    r = replace(recipe, arms=[*recipe.arms, CACHED])
    (tmp_path/'r.yaml').write_text(recipe_yaml(r), encoding='utf-8')
    def launch(command, *more):
        args = ['torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m', 'slm_begin', command]
        done = subprocess.run([sys.executable, '-m', *args, '--recipe', str(tmp_path/'r.yaml'), '--out', str(tmp_path/'run'), *more], capture_output=True,
                              text=True, env={**os.environ, 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'}, timeout=300)
        assert not done.returncode, done.stderr
        return done.stdout
    launch('search')
    told = [[(h['key'], h['pieces'], h['total_tokens']) for h in read_lines(f/'search'/'history.jsonl')] for f in (tmp_path/'run', whole)]
    assert told[0] == told[1]
    launch('cache-teacher')
    assert (tmp_path/'run'/'cache'/'manifest.json').exists() and not (tmp_path/'run'/'arms').exists()
    launch('pretrain', '--only', 'random')
    out = launch('run')
    assert out.count('report: ') == 1 and 'as good as' in out
    two, one = ({a['name']: a['final_loss'] for a in collect(f)['arms']} for f in (tmp_path/'run', whole))
    for name, loss in one.items(): assert abs(two[name] - loss) < 2e-3, (name, two[name], loss)
    start = {a['name']: a['curve'][0]['valid_loss'] for a in collect(tmp_path/'run')['arms']}
    assert start['cached'] == pytest.approx(start['one-shot'], abs=1e-5) and two['cached'] < start['cached']


@pytest.mark.parametrize('role, other', [('calib', 'train'), ('calib', 'valid'), ('valid', 'train')])
def test_text_that_is_in_two_splits_is_refused(role, other, made, flags, tmp_path):
    text = lambda split: (made/f'{split}.txt').read_text(encoding='utf-8')[:30_000]
    (tmp_path/'mixed.txt').write_text(text(role) + text(other), encoding='utf-8')
    windows = [f'--{k}.windows=100' for k in ('importance', 'fitness', 'evaluation')]
    r = load_recipe('tiny', [*flags, *windows, f"--text.{other if other == 'train' else role}={tmp_path/'mixed.txt'}"])
    with pytest.raises(ValueError, match=f'`text.{role}` and `text.{other}` overlap: .*allow_overlap=[01]\\.'): run(r, tmp_path/'run', say=quiet)
    assert not (tmp_path/'run'/'teacher.json').exists()
    allowed = replace(r, text=replace(r.text, allow_overlap=1.), arms=[Arm('a', start='random')])
    assert run(allowed, tmp_path/'other', say=quiet).exists()


def test_same_recipe_goes_on_and_another_is_refused(whole, recipe, flags, tmp_path):
    said, out, before = [], tmp_path/'run', ends(whole)
    shutil.copytree(whole, out)
    run(recipe, out, say=said.append)
    assert said[0] == '10 of 11 stages are finished already' and all(line.startswith('[11/11]') for line in said[1:]) and ends(out) == before
    assert run(None, out, resume=True, say=quiet).exists()
    other = load_recipe('tiny', [*flags, '--train.lr=1e-3'])
    with pytest.raises(ValueError, match=r'another recipe: train.lr \(0.002 there, 0.001 here\).*--resume.*--out'): run(other, out)
    with pytest.raises(ValueError, match='--resume'): claim(None, out)
    assert ends(out) == before


def test_folder_that_is_no_run(recipe, tmp_path):
    (tmp_path/'thesis.txt').write_text('precious')
    with pytest.raises(ValueError, match='is not empty and not a run folder'): run(recipe, tmp_path, say=quiet)
    with pytest.raises(FileNotFoundError, match='holds no run to go on with'): run(None, tmp_path/'x', resume=True)
    assert [f.name for f in tmp_path.iterdir()] == ['thesis.txt']


def test_folder_that_cannot_be_written(recipe, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match=r'the run folder `.*run` cannot be written \(Not a directory\): name another one with `--out`'):
        run(recipe, tmp_path/'file'/'run', say=quiet)


class Killed(BaseException): pass


def killing(pattern):
    "A `say` that ends the run at the first line that matches."
    def say(line):
        if re.search(pattern, line): raise Killed
    return say


@pytest.mark.parametrize('patterns', [
    [r'calib.txt train: [\d,]+ tokens', r'importance: 4', 'best of 1'],
    pytest.param([r'what the teacher', r're-ranking 2/', r'random search, to compare', r'\[7/11\] step +1/', r'training: evolved sub'], marks=pytest.mark.slow),
    pytest.param([r'\[10/11\] step +8/8', r'\[11/11\] report'], marks=pytest.mark.slow),
])
def test_killed_runs_end_the_same(patterns, recipe, whole, tmp_path):
    for p in patterns:
        with pytest.raises(Killed): run(recipe, tmp_path/'run', say=killing(p))
    run(recipe, tmp_path/'run', say=quiet)
    assert ends(tmp_path/'run') == ends(whole)
    a, b = (collect(f) for f in (tmp_path/'run', whole))
    for x, y in zip(a['arms'], b['arms'], strict=True): assert {**x, 'seconds': 0} == {**y, 'seconds': 0}


@pytest.mark.slow
def test_stop_is_asked(recipe, whole, tmp_path):
    asked = []
    def stop():
        asked.append(1)
        return len(asked) in (3, 20, 40)            # at a stage, within the search, within training
    stops = 0
    while True:
        try: run(recipe, tmp_path/'run', say=quiet, stop=stop)
        except KeyboardInterrupt as e: stops += isinstance(e, Stopped) or 'search stopped' in str(e)
        else: break
    assert stops == 3 and ends(tmp_path/'run') == ends(whole)
    assert 'stopped' in (tmp_path/'run'/'log.txt').read_text(encoding='utf-8')


def test_damaged_checkpoint(recipe, whole, tmp_path):
    "The newest checkpoint of a killed run is damaged: the one before is used, the log says so, and the end is the same."
    out, arm = tmp_path/'run', recipe.arms[-1].name
    with pytest.raises(Killed): run(recipe, out, say=killing(r'\[10/11\] step +8/8'))
    newest = max((out/'arms'/arm/'checkpoints').glob('step-??????'))
    (newest/'model.safetensors').write_bytes(b'oops')
    run(recipe, out, say=quiet)
    assert re.search(rf'{newest.name} is damaged \(model.safetensors is not as it was written\); falling back', (out/'log.txt').read_text(encoding='utf-8'))
    assert ends(out) == ends(whole)


def test_lost_student_is_made_again(recipe, whole, tmp_path):
    out = tmp_path/'run'
    shutil.copytree(whole, out)
    shutil.rmtree(out/'arms'/'evolved'/'final')
    (out/'arms'/'one-shot'/'final.partial').mkdir()             # a save that was cut short leaves this
    run(recipe, out, say=quiet)
    assert ends(out) == ends(whole)


@pytest.mark.slow
def test_sigkill(recipe, whole, tmp_path):
    "A process that is killed for good, at moments that it does not choose."
    (tmp_path/'r.yaml').write_text(recipe_yaml(recipe), encoding='utf-8')
    out = tmp_path/'run'
    for wait_for in 'search/history.jsonl', 'arms/one-shot/checkpoints/*/model.safetensors', 'arms/evolved-kd/initial/config.json':
        p = subprocess.Popen([sys.executable, '-m', 'slm_begin', 'run', '--recipe', str(tmp_path/'r.yaml'), '--out', str(out)], stdout=subprocess.DEVNULL)
        while p.poll() is None and not list(out.glob(wait_for)): time.sleep(.01)
        p.send_signal(signal.SIGKILL)
        assert p.wait() == -signal.SIGKILL, 'it was too fast to be killed'
    run(recipe, out, say=quiet)
    assert ends(out) == ends(whole)


def test_failure_is_in_the_log(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, 'measure', lambda *args, **kw: 1 / 0)
    with pytest.raises(ZeroDivisionError): run(recipe, tmp_path/'run', say=quiet)
    assert 'ZeroDivisionError' in (tmp_path/'run'/'log.txt').read_text(encoding='utf-8')


def test_students_load_without_slm_begin(whole):
    "Plain transformers, in a process without slm_begin, gives the logits that we have."
    import torch

    from slm_begin.supernet import load_model
    folder = whole/'arms'/'one-shot'/'final'
    assert 'auto_map' not in json.loads((folder/'config.json').read_text())
    program = ("import sys, torch\nfrom transformers import AutoModelForCausalLM\nm = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
               "with torch.no_grad(): print(m(torch.arange(20)[None]).logits.double().sum().item())\nassert 'slm_begin' not in sys.modules")
    done = subprocess.run([sys.executable, '-c', program, str(folder)], capture_output=True, text=True, env={**os.environ, 'HF_HUB_OFFLINE': '1'})
    assert not done.returncode, done.stderr
    with torch.no_grad(): ours = load_model(folder)(torch.arange(20)[None]).logits.double().sum().item()
    assert float(done.stdout) == pytest.approx(ours, abs=1e-6)


def test_identity_order_needs_no_importance(recipe, tmp_path):
    r = replace(recipe, space=replace(recipe.space, order='identity'), random_search=False, arms=[Arm('one', 'one', 'one-shot')])
    run(r, tmp_path/'run', say=quiet)
    data = collect(tmp_path/'run')
    assert data['importance'] is None and data['arms'][0]['cost']['importance'] == 0 and not data['search']['evolve']


# The report

def test_report_is_one_file(whole):
    page = (whole/'report'/'index.html').read_text(encoding='utf-8')
    assert page.startswith('<!doctype html>') and 'width=device-width' in page and 'prefers-color-scheme: dark' in page
    assert not re.search(r'(src|href)="(?!data:)', page) and '<script' not in page and 'url(' not in page
    assert page.count('<img src="data:image/png;base64,') == page.count(' alt="') >= 5 and ' alt=""' not in page
    assert page.count('<table class="slm-subnet" aria-label="') >= 2
    for title in 'The arms', 'Validation perplexity', 'The search', 'Shapes inside the teacher', 'What matters', 'What it cost', 'What they write':
        assert title in page


def test_report_escapes(whole, tmp_path):
    data = json.loads((whole/'report'/'data.json').read_text(encoding='utf-8'))
    evil = '<img src=x onerror=alert(1)>"\'&'
    data['title'] = data['arms'][1]['title'] = data['arms'][1]['samples'][0]['text'] = data['teacher']['name'] = evil
    data['recipe']['teacher'] = data['environment']['processor'] = data['teacher_samples'][0]['prompt'] = evil
    page = pipeline.report_html(data)
    assert '<img src=x' not in page and '&lt;img src=x onerror=alert(1)&gt;' in page


def test_report_of_an_unfinished_run(recipe, tmp_path):
    out = tmp_path/'run'
    with pytest.raises(Killed): run(recipe, out, say=killing('training: evolved sub'))
    assert 'Not finished yet: evolved sub-network, evolved + distillation' in make_report(out).read_text(encoding='utf-8')
    shutil.rmtree(tmp_path/'run')
    with pytest.raises(Killed): run(recipe, out, say=killing('training: random'))
    with pytest.raises(ValueError, match='has no finished arm yet.*--resume'): make_report(out)


def test_old_report_survives(whole, tmp_path, monkeypatch):
    out = tmp_path/'run'
    shutil.copytree(whole, out)
    old = {f.name: f.read_bytes() for f in (out/'report').iterdir()}
    monkeypatch.setattr(pipeline, 'sections', lambda data: 1 / 0)
    with pytest.raises(ZeroDivisionError): make_report(out)
    assert {f.name: f.read_bytes() for f in (out/'report').iterdir()} == old


# Teachers

@pytest.fixture(scope='session')
def small(made):
    "A teacher that is trained in a second or two."
    flags = """--model.embd=32 --model.layers=2 --model.heads=4 --model.ffn=48 --model.context=64 --train.tokens=5120 --train.seq_len=64 --train.batch_size=8
        --train.short_len=32 --train.compile=false --train.warmup_steps=2 --train.evals=3 --train.checkpoint_every=3steps
        --evaluation.seq_len=64 --evaluation.windows=4 --samples.tokens=8"""
    return load_recipe('teacher', [f'--text.train={made}/train.txt', f'--text.valid={made}/valid.txt', *flags.split()], TeacherRecipe)


def test_train_teacher(small, tmp_path):
    "Stopped and continued: the same weights; an ordinary bf16 checkpoint with its story."
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = train_teacher(small, tmp_path/'a', say=quiet)
    asked = []
    def stop():
        asked.append(1)
        return len(asked) == 4
    with pytest.raises(Stopped): train_teacher(small, tmp_path/'b', say=quiet, stop=stop)
    assert not (tmp_path/'b'/'model').exists()
    again = train_teacher(None, tmp_path/'b', resume=True, say=quiet)
    assert (model/'model.safetensors').read_bytes() == (again/'model.safetensors').read_bytes()
    assert {t.dtype for t in load_file(model/'model.safetensors').values()} == {torch.bfloat16}
    net, tok = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    assert net.config.rope_parameters['partial_rotary_factor'] == .25 and not net.config.tie_word_embeddings and len(tok) == 4096
    assert net.generation_config.do_sample and net.generation_config.temperature == .8
    card = (model/'README.md').read_text(encoding='utf-8')
    for text in 'width 32, 2 layers', '`train.txt`: 1 documents', '5,120 tokens', 'initialisation 0', 'loss.png', 'torch ', '## Samples', 'lr: 0.002':
        assert text in card, text
    assert str(tmp_path) not in card and (model/'loss.png').read_bytes().startswith(b'\x89PNG')


def test_train_teacher_for_some_minutes(small, tmp_path, monkeypatch):
    "When time is up, what is done is saved. Where the tokens are there already, neither the text nor `datasets` is asked for."
    texts = {role: tmp_path/f'{role}.txt' for role in ('train', 'valid')}
    for role, path in texts.items(): shutil.copy(getattr(small.text, role), path)
    r = replace(small, text=replace(small.text, **{role: str(path) for role, path in texts.items()}))
    with pytest.raises(Stopped, match='stopped at step 1 of 10'): train_teacher(r, tmp_path/'a', say=quiet, minutes=1e-9)
    for path in texts.values(): path.unlink()
    monkeypatch.setitem(sys.modules, 'datasets', None)
    known = pipeline.metadata.version
    def version(name):
        if name == 'datasets': raise pipeline.metadata.PackageNotFoundError(name)
        return known(name)
    monkeypatch.setattr(pipeline.metadata, 'version', version)
    assert (train_teacher(r, tmp_path/'a', say=quiet)/'model.safetensors').exists()
    assert pipeline.environment()['datasets'] is None and pipeline.environment()['torch'] == known('torch')


def test_train_teacher_takes_over_a_folder(small, tmp_path):
    "A folder that was begun by hand with the same settings (data, teacher/run.json) is finished, other settings are refused."
    asked = iter(range(100))
    with pytest.raises(Stopped): train_teacher(small, tmp_path/'a', say=quiet, stop=lambda: next(asked) == 5)
    (tmp_path/'a'/'recipe.yaml').unlink()
    other = replace(small, train=replace(small.train, lr=1e-3))
    with pytest.raises(ValueError, match='holds a run with other settings'): train_teacher(other, tmp_path/'a', say=quiet)
    said = []
    (tmp_path/'a'/'recipe.yaml').unlink()
    train_teacher(small, tmp_path/'a', say=said.append)
    assert any(line.startswith('resumed at step 6') for line in said)


@pytest.mark.parametrize('family', pipeline.FAMILIES)
def test_teachers_of_each_family_are_supernets(family, tok):
    "With grouped queries, too; the seed decides the weights."
    from slm_begin.supernet import Supernet
    a = pipeline.Architecture(family, embd=32, layers=2, heads=4, kv_heads=None if family == 'gpt_neox' else 2, ffn=48, context=64)
    one, same, other = (a.model(tok, seed) for seed in (0, 0, 1))
    weight = lambda m: m.get_input_embeddings().weight
    assert one.config.model_type == family and torch.equal(weight(one), weight(same)) and not torch.equal(weight(one), weight(other))
    net = Supernet(one)
    assert net.full.sizes['heads'] == [4 if family == 'gpt_neox' else 2] * 2 and net.count(net.full) == one.num_parameters()
    assert one(torch.zeros(1, 64, dtype=torch.long)).logits.shape == (1, 64, len(tok)) and str(a).startswith(f'{family}: width 32')


@pytest.mark.parametrize('settings, message', [
    ({'train.lrr': 1}, "there is no setting `train.lrr`: did you mean `train.lr`?"),
    ({'trian.lr': 1}, "there is no setting `trian`: did you mean `train`?"),
    ({'train.lr': 10}, '`train.lr` is 10'),
])
def test_changed_refuses(settings, message, recipe):
    with pytest.raises(ValueError, match=re.escape(message)): pipeline.changed(recipe, settings)


@pytest.mark.parametrize('settings, message', [
    ({'train.tokens': 'many'}, "`train.tokens` is 'many'; it must be of the type int"),
    ({'train.tokens': True}, '`train.tokens` is True; it must be of the type int'),
    ({'train.compile': 'yes'}, "`train.compile` is 'yes'; it must be of the type bool"),
    ({'train': {'lr': 'fast'}}, "`train.lr` is 'fast'; it must be of the type float"),
    ({'train.lr.peak': 1}, "`train.lr.peak` is {'peak': 1}; it must be of the type float"),
    ({'space.round_to': {'embd': 'a'}}, "`space.round_to` is {'embd': 'a'}; it must be of the type dict[str, int]"),
    ({'space.query_heads': [1, 'a']}, "`space.query_heads` is [1, 'a']; it must be of the type list[int] | None"),
    ({'text.max_tokens': 1.5}, '`text.max_tokens` is 1.5; it must be of the type int | None'),
])
def test_changed_checks_types(settings, message, recipe):
    with pytest.raises(ValueError, match=re.escape(message)): pipeline.changed(recipe, settings)


def test_changed_of_a_group_leaves_the_rest(recipe):
    other = pipeline.changed(recipe, {'train': {'tokens': 4096, 'lr': '1e-3'}, 'search': {'budget': {'evaluations': 9}}, 'text.max_tokens': None})
    assert other.train == replace(recipe.train, tokens=4096, lr=1e-3) and other.text.max_tokens is None
    assert other.search == replace(recipe.search, budget=replace(recipe.search.budget, evaluations=9))


def test_the_working_directory_stays(monkeypatch):
    "Reading a recipe is safe beside other threads, which a change of directory would not be: a study reads many while its runs are started."
    def moved(to): raise AssertionError(f'moved to {to}')
    monkeypatch.setattr(os, 'chdir', moved)
    assert load_recipe('demo').title and load_recipe('demo', ['--train.lr=1e-4']).train.lr == 1e-4


def test_changed(recipe):
    other = pipeline.changed(recipe, {'train.lr': 1e-4, 'bin.fraction': .4, 'seed': 7})
    assert pipeline.differences(recipe, other) == [f'bin.fraction ({recipe.bin.fraction} there, 0.4 here)', f'seed ({recipe.seed} there, 7 here)',
                                                   f'train.lr ({recipe.train.lr} there, 0.0001 here)']
    assert pipeline.changed(recipe, {}) == recipe


@pytest.mark.parametrize('change, message', [
    (['--model.heads=5'], '`model.embd` is 32; it must be a multiple of `heads` (5)'),
    (['--train.seq_len=128', '--train.short_len=0'], '`train.seq_len` is 128; `model.context` is 64'),
    (['--model.family=bert'], "`model.family` is 'bert'; choose one of gpt_neox, llama, qwen3"),
    (['--model.kv_heads=2'], '`model.kv_heads` is 2; a gpt_neox has a key and value for each head'),
    (['--model.family=llama', '--model.kv_heads=3'], '`model.kv_heads` is 3; `heads` (4) must be a multiple of it'),
    (['--model.rotary=2'], '`model.rotary` is 2.0; it must lie between 0 and 1'),
    (['--text.train=no/such.txt'], 'no such file or folder'),
    (['--train.batch_size=100000'], 'too few for one batch'),
])
def test_teacher_refused(change, message, small, tmp_path):
    (tmp_path/'r.yaml').write_text(recipe_yaml(small), encoding='utf-8')
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        train_teacher(load_recipe(tmp_path/'r.yaml', change, TeacherRecipe), tmp_path/'run', say=quiet)
    assert not (tmp_path/'run'/'recipe.yaml').exists()


def test_constraints_of_the_space_reach_it(flags, tmp_path):
    "Every student of a recipe with `native_only` loads with plain `from_pretrained`; smaller heads do not."
    from transformers import AutoModelForCausalLM
    more = ['--space.at_least={layers: 2}', '--space.score=weight', '--random_search=false', '--arms=[{"name": "a", "start": "random"}, {"name": "b"}]']
    run(load_recipe('tiny', [*flags, *more, '--space.native_only=true', '--bin.tolerance=.3']), tmp_path/'native', say=quiet)
    sizes = [line['sizes'] for line in read_lines(tmp_path/'native'/'search'/'history.jsonl')]
    assert all(len(s['layers']) > 1 and s['embd']==16 * s['heads'][0] for s in sizes)
    assert AutoModelForCausalLM.from_pretrained(tmp_path/'native'/'arms'/'b'/'final').config.architectures==['GPTNeoXForCausalLM']
    run(load_recipe('tiny', [*flags, *more, '--space.head_sizes=[8, 16]']), tmp_path/'smaller', say=quiet)
    assert {line['sizes'].get('head_size', 16) for line in read_lines(tmp_path/'smaller'/'search'/'history.jsonl')}=={8, 16}
    assert Importance.load(tmp_path/'smaller'/'importance.safetensors').source['score']==dict(layers='weight', embd='weight', heads='weight', ffn='weight')
