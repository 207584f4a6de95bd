"study: what may be wrong, learning rates, what is shared and not done twice, gains, judging; children that fail or lose their study; the one for a GPU."
# ruff: noqa: F811  (fixtures that come from test_pipeline)
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings, strategies as st
from test_pipeline import flags, made, no_figures, quiet  # noqa: F401

from slm_begin import pipeline, study as module
from slm_begin.data import OTHERS, Stopped, append_line, read_lines, write_json
from slm_begin.pipeline import Arm, TeacherRecipe, load_recipe, recipe_yaml
from slm_begin.study import Cell, Study, StudyRecipe, gain, link_folder, next_rates, rate_name, summary, teacher_to_come

ARMS = [Arm('random', start='random'), Arm('one-shot', start='one-shot'), Arm('cached', start='one-shot', objective='kd', teacher='cached'),
        Arm('live', start='one-shot', objective='kd')]


@pytest.fixture(scope='module')
def base(flags): return replace(load_recipe('tiny', [*flags, '--train.tokens=1024', '--evaluation.seq_len=32', '--train.checkpoint_every=']), arms=ARMS)


@pytest.fixture(scope='module')
def toy(base):
    "Two cells of the same text and order, the second with the first one's learning rates, and one that is shorter."
    return StudyRecipe('Toy', base, lrs=[1e-3, 2e-3, 4e-3], seeds=[1], windows=2, lr_like={'live': 'cached'}, cells=[
        Cell('a', arms=['random', 'one-shot', 'cached']), Cell('b', arms=['cached', 'live'], lrs_of='a', reference='a', settings={'bin.fraction': .4}),
        Cell('c', arms=['one-shot'], settings={'train.tokens': 512, 'train.evals': 3})])


def inside(self, job, threads):
    "The work of a child, in this process."
    self.make_folder(job)
    part, only = ('pretrain', job.only) if job.only else ('run', ())
    pipeline.run(None, self.out/job.name, True, quiet, part=part, only=only)
    self.tidy(self.out/job.name)
    return 1.


@pytest.fixture
def in_process(monkeypatch): monkeypatch.setattr(Study, 'work', inside)


@pytest.fixture(scope='module')
def whole(toy, tmp_path_factory):
    "A finished study, with what was read of the test texts, in order."
    out, read, losses = tmp_path_factory.mktemp('study')/'s', [], Study.losses
    def spy(self, model):
        read.append((str(model), [len(list(out.glob(f'{c.name}/seed-1/report/data.json'))) for c in toy.cells]))
        return losses(self, model)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Study, 'work', inside), m.setattr(Study, 'losses', spy), m.setattr(pipeline, 'html_figure', lambda fig, caption='': '')
        data = Study(toy, out, quiet).run()
    return out, data, read


def copy(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path/'s')
    return tmp_path/'s'

def last(folder): return [m['valid_loss'] for m in read_lines(folder/'metrics.jsonl') if 'valid_loss' in m][-1]


# What may be wrong

@pytest.mark.parametrize('change, message', [
    (dict(lrs=[1e-3, 2e-3]), '`lrs` is [0.001, 0.002]; a sweep needs at least three'),
    (dict(seeds=[]), '`seeds` is []; give at least one'),
    (dict(seeds=[1, 0]), 'none of them `sweep_seed` (0)'),
    (dict(texts=['novel']), "`texts` names 'novel'; choose among test, bible, manual"),
    (dict(cells=[Cell('a'), Cell('a')]), 'two cells are called `a`'),
    (dict(cells=[Cell('a', arms=['x'])]), '`arms` of the cell `a` names `x`; there are random, one-shot'),
    (dict(cells=[Cell('a', lrs_of='x')]), '`lrs_of` of the cell `a` names `x`; there are a'),
    (dict(cells=[Cell('a', reference='x')]), '`reference` of the cell `a` names `x`; there are a'),
    (dict(lr_like={'x': 'random'}), '`lr_like` names the arm `x`'),
    (dict(lr_like={'random': 'x'}), '`lr_like` names the arm `x`'),
    (dict(lr_like={'random': 'live', 'live': 'random'}), '`lr_like` goes in a circle: random, live, random'),
    (dict(cells=[Cell('a', lrs_of='b'), Cell('b', lrs_of='c'), Cell('c', lrs_of='a')]), '`lrs_of` goes in a circle: a, b, c, a'),
    (dict(cells=[Cell('a', arms=['live'])]), 'the arm `live` of the cell `a` takes the learning rate of `cached` in `a`, where that is not swept'),
    (dict(cells=[Cell('a', settings={'train.tokns': 1})]), 'cell `a`: there is no setting `train.tokns`: did you mean `train.tokens`?'),
    (dict(cells=[Cell('a', settings={'train.tokens': -1})]), 'cell `a`: `train.tokens` is -1; it must be at least 1'),
    (dict(cells=[Cell('a', settings={'train.tokens': 'many'})]), "cell `a`: `train.tokens` is 'many'; it must be of the type int"),
    (dict(cells=[Cell('a', settings={'bin.fraction': [1]})]), 'cell `a`: `bin.fraction` is [1]; it must be of the type float'),
])
def test_recipes_refused(change, message, toy):
    with pytest.raises(ValueError, match=re.escape(message)): replace(toy, **change)


@pytest.mark.parametrize('text, message', [
    ('cells: [{title: x}]', 'the setting `cells.0.name` is missing'),
    ('cells: [{name: a, arm: [random]}]', 'there is no setting `cells.0.arm`: did you mean `cells.0.arms`?'),
    ('base: {train: {lr: fast}}', 'lr'),
    ('seed: [1]', 'there is no setting `seed`: did you mean `seeds`?'),
])
def test_files_refused(text, message, tmp_path):
    (tmp_path/'r.yaml').write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)): load_recipe(tmp_path/'r.yaml', cls=StudyRecipe)


def test_round_trip(toy, tmp_path):
    (tmp_path/'r.yaml').write_text(recipe_yaml(toy))
    assert load_recipe(tmp_path/'r.yaml', cls=StudyRecipe) == toy


def test_refused_before_any_work(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(Study, 'work', lambda *a: pytest.fail('work was begun'))
    def refused(message, recipe=toy, out=tmp_path/'none', error=ValueError, **kw):
        with pytest.raises(error, match=re.escape(message)): Study(recipe, out, quiet).run(**kw)
        assert not (tmp_path/'none').exists()
    refused('there is no cell `x` in this study: there are a, b, c', only=['a', 'x'])
    refused('`jobs` is 0; it must be at least 1', jobs=0)
    refused('the learning rate of `cached` is that of the cell `a`, where it is not known yet: name that cell, too', only=['b'])
    refused('cell `a`: model `no/such/model/folder`: no such folder', replace(toy, base=replace(toy.base, teacher='no/such/model/folder')), error=OSError)
    refused('(train it first: slm_begin train-teacher --recipe teacher-gpu --out no/such/teacher-gpu)',
            replace(toy, base=replace(toy.base, teacher='no/such/teacher-gpu/model')), error=OSError)
    refused('cell `c`: `train.seq_len` is 4096', replace(toy, cells=[*toy.cells[:2], Cell('c', settings={'train.seq_len': 4096})]))
    refused('cell `c`:', replace(toy, cells=[*toy.cells[:2], Cell('c', settings={'bin.fraction': 1e-4})]))
    (tmp_path/'x').mkdir()
    (tmp_path/'x'/'letter.txt').write_text('dear')
    refused('is not empty and not the folder of a study', out=tmp_path/'x')


def test_runs_of_other_settings_are_refused(whole, toy, tmp_path):
    "Finished ones, too: their results would stand under the new settings."
    out = copy(whole, tmp_path)
    other = replace(toy.cells[2], settings={'train.tokens': 768})
    for change in dict(base=replace(toy.base, train=replace(toy.base.train, weight_decay=.2))), dict(cells=[*toy.cells[:2], other]):
        with pytest.raises(ValueError, match='holds a run of another recipe: .*(weight_decay|train.tokens)'): Study(replace(toy, **change), out, quiet).run()
    assert Study(toy, out, quiet).check() is None


def test_one_at_a_time(toy, tmp_path):
    s = Study(toy, tmp_path/'s', quiet)
    with s.alone(), pytest.raises(ValueError, match='another process is at work on the study'), Study(toy, tmp_path/'s', quiet).alone(): pass
    with s.alone(): pass


# Learning rates

losses = st.one_of(st.floats(.1, 20), st.just(math.inf))

@given(st.lists(st.floats(1e-5, .5), min_size=3, max_size=10, unique=True).map(sorted), st.floats(1e-6, .9), st.data())
@settings(max_examples=200, deadline=None)
def test_next_rates(lrs, begin, data):
    "It ends; tries nothing twice and nothing else; its best is inside, or at the end of what may be tried; what it tried is one stretch of `lrs`."
    loss, tried, rounds = {lr: data.draw(losses) for lr in lrs}, {}, 0
    while more := next_rates(lrs, begin, tried):
        assert not {*more} & {*tried} and {*more} <= {*lrs} and (rounds or len(more) == 3)
        tried |= {lr: loss[lr] for lr in more}
        assert (rounds := rounds + 1) <= len(lrs)
    at = sorted(map(lrs.index, tried))
    assert at == [*range(at[0], at[-1] + 1)] and len(at) >= 3
    best = lrs.index(min(tried, key=tried.get))
    assert at[0] < best < at[-1] or best in (0, len(lrs) - 1)

@given(st.lists(losses, min_size=5, max_size=5), st.sets(st.integers(0, 2)))
@example([1., 2., 3., 4., 5.], {0})
def test_a_sweep_that_was_stopped_tries_what_is_missing(values, there):
    lrs = [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]
    assert next_rates(lrs, 2e-3, {lrs[i]: values[i] for i in there}) == [lrs[i] for i in range(3) if i not in there] or there == {0, 1, 2}


def write_sweep(out, cell, arm, found, diverged=()):
    "What a sweep leaves behind."
    folder = out/cell/'sweep'
    account = json.loads((folder/'account.json').read_text()) if (folder/'account.json').exists() else dict(finished=[])
    for lr, loss in found.items():
        (at := folder/'arms'/rate_name(arm, lr)).mkdir(parents=True)
        append_line(at/'metrics.jsonl', dict(step=0, valid_loss=99.))
        append_line(at/'metrics.jsonl', dict(step=1, loss=1.))
        append_line(at/'metrics.jsonl', dict(step=1, valid_loss=loss))
        account['finished'].append(f'arm {rate_name(arm, lr)}')
    for lr in diverged: write_json(folder/'arms'/rate_name(arm, lr)/'run.json', dict(troubles=[dict(step=3, what='...')]))
    write_json(folder/'account.json', account)


def test_whose_learning_rate(base, tmp_path):
    r = StudyRecipe('x', replace(base, arms=[*base.arms, Arm('fixed', lr=.5), Arm('like-fixed')]), seeds=[1], lrs=[1e-3, 2e-3, 4e-3],
                    lr_like={'live': 'cached', 'like-fixed': 'fixed'},
                    cells=[Cell('a'), Cell('b', lrs_of='a'), Cell('c', arms=['random', 'live', 'fixed'], lrs_of='b'),
                           Cell('d', arms=['cached', 'live', 'like-fixed'])])
    s, of = Study(r, tmp_path, quiet), lambda cell: {a.name: s.lr(r.cell(cell), a) for a in r.arms_of(r.cell(cell))}
    assert [[a.name for a in r.swept(c)] for c in r.cells] == [['random', 'one-shot', 'cached'], [], [], ['cached']]
    assert of('a') == dict(random=None, **{'one-shot': None}, cached=None, live=None, fixed=.5, **{'like-fixed': .5})
    write_sweep(tmp_path, 'a', 'random', {1e-3: 3., 2e-3: 2., 4e-3: 1.})
    write_sweep(tmp_path, 'a', 'one-shot', {1e-3: 3., 2e-3: 2.})
    write_sweep(tmp_path, 'a', 'cached', {1e-3: 1., 2e-3: 2., 4e-3: 3.})
    write_sweep(tmp_path, 'd', 'cached', {1e-3: 2., 2e-3: 1., 4e-3: 3.})
    assert of('a') == of('b') == dict(random=4e-3, **{'one-shot': None}, cached=1e-3, live=1e-3, fixed=.5, **{'like-fixed': .5})
    assert of('c') == dict(random=4e-3, live=1e-3, fixed=.5) and of('d') == {'cached': 2e-3, 'live': 2e-3, 'like-fixed': .5}
    assert [(j.name, j.only) for j in s.jobs()] == [('a/sweep', ('one-shot-lr-0.004',)), ('c/seed-1', ()), ('d/seed-1', ())]
    jobs = {j.name: {a.name: a.lr for a in j.recipe.arms} for j in s.jobs()}
    assert jobs['c/seed-1'] == of('c') and jobs['d/seed-1'] == of('d')
    assert s.rate_data(r.cell('c'), r.arm('live'), 1e-3) == dict(lr=1e-3, sweep=[], lr_from='a/cached')
    assert s.rate_data(r.cell('d'), r.arm('cached'), 2e-3) == dict(lr=2e-3, sweep=[[1e-3, 2.], [2e-3, 1.], [4e-3, 3.]])


def test_diverged_rates(base, tmp_path):
    "They count as the worst, and are not tried again; where nothing else is left, that is said."
    r = StudyRecipe('x', replace(base, arms=ARMS[:1]), [Cell('a')], lrs=[1e-3, 2e-3, 4e-3], seeds=[1])
    s, cell = Study(r, tmp_path, quiet), r.cells[0]
    write_sweep(tmp_path, 'a', 'random', {1e-3: 3.}, diverged=[4e-3])
    assert s.tried(cell, 'random') == {1e-3: 3., 4e-3: math.inf} and [j.only for j in s.jobs()] == [('random-lr-0.002',)]
    write_sweep(tmp_path, 'a', 'random', {2e-3: 2.})
    assert s.lr(cell, ARMS[0]) == 2e-3 and s.rate_data(cell, ARMS[0], 2e-3)['sweep'][-1] == [4e-3, None]
    write_json(tmp_path/'a'/'sweep'/'account.json', dict(finished=[]))
    for lr in 1e-3, 2e-3: write_json(tmp_path/'a'/'sweep'/'arms'/rate_name('random', lr)/'run.json', dict(troubles=[1]))
    with pytest.raises(ValueError, match='the arm `random` of the cell `a` diverged at every learning rate'): s.lr(cell, ARMS[0])


# A whole study

def test_what_is_done_is_not_done_again(whole, toy, monkeypatch):
    out, data, read = whole
    monkeypatch.setattr(Study, 'work', lambda *a: pytest.fail('done twice'))
    monkeypatch.setattr(Study, 'losses', lambda *a: pytest.fail('test texts read twice'))
    said = []
    again = Study(toy, out, said.append).run(jobs=2)
    assert again['cells'] == data['cells'] == json.loads((out/'study.json').read_text())['cells'] and said == []
    assert not list(out.glob('*/*/arms/*/initial')) and not list(out.glob('*/*/arms/*/checkpoints')) and len(list(out.glob('*/seed-1/arms/*/final'))) == 6


def test_test_texts_are_read_at_the_end_and_once(whole, toy):
    out, data, read = whole
    assert {tuple(done) for _, done in read} == {(1, 1, 1)}                  # every report was there
    names = [j['name'] for j in read_lines(out/'judged.jsonl')]
    students = [f'{c.name}/seed-1/{a.name}' for c in toy.cells for a in toy.arms_of(c)]
    assert sorted(names) == sorted([*students, *(f'{c.name}/teacher' for c in toy.cells)]) and len({m for m, _ in read}) == len(read) == 7
    for c in data['cells'].values():
        assert {*c['teacher']['test']} == {*OTHERS} and all({*r['test']} == {*OTHERS} for a in c['arms'].values() for r in a['runs'])


def test_tokens_and_caches_are_linked_where_they_are_the_same(whole):
    inode = lambda name: (whole[0]/name).stat().st_ino
    shard = 'data/train/shard-00000.bin'
    assert inode(f'a/sweep/{shard}') == inode(f'a/seed-1/{shard}') == inode(f'b/seed-1/{shard}') == inode(f'c/sweep/{shard}')
    cache = 'cache/shard-00000.safetensors'
    assert inode(f'a/seed-1/{cache}') == inode(f'b/seed-1/{cache}') != inode(f'a/sweep/{cache}')      # the sweep's order is another
    assert not (whole[0]/'c'/'seed-1'/'cache').exists()                                               # nothing there learns from one


def test_a_linked_cache_is_as_one_made(whole, toy, tmp_path):
    out = whole[0]
    pipeline.run(pipeline.claim(None, out/'b'/'seed-1', resume=True), tmp_path/'alone', say=quiet)
    for arm in 'cached', 'live':
        model = f'arms/{arm}/final/model.safetensors'
        assert (out/'b'/'seed-1'/model).read_bytes() == (tmp_path/'alone'/model).read_bytes()
    arms = lambda folder: {a['name']: (a['cost'], a['curve'][-1]['flops']) for a in json.loads((folder/'report'/'data.json').read_text())['arms']}
    assert arms(out/'b'/'seed-1') == arms(tmp_path/'alone') and arms(tmp_path/'alone')['cached'][0]['teacher'] > 0


def test_sweeps_decide(whole, toy):
    out, data, _ = whole
    for cell in 'a', 'c':
        for name, arm in data['cells'][cell]['arms'].items():
            found = {lr: last(out/cell/'sweep'/'arms'/rate_name(name, lr)) for lr in toy.lrs}
            assert dict(map(tuple, arm['sweep'])) == found and arm['lr'] == min(found, key=found.get)
    rates = {name: arm['lr'] for name, arm in data['cells']['a']['arms'].items()}
    b = data['cells']['b']['arms']
    assert b['cached']['lr'] == b['live']['lr'] == rates['cached'] and b['live']['lr_from'] == b['cached']['lr_from'] == 'a/cached' and b['live']['sweep'] == []


def crossing(curve, target, x):
    "Where a loss curve is first as low as `target`, straight between points over log x, found by bisection."
    for before, after in zip(curve, curve[1:]):
        if before['valid_loss'] <= target: return before[x]
        if after['valid_loss'] > target: continue
        low, high = before[x], after[x]
        for _ in range(200):
            mid = math.sqrt(low * high) if before[x] else (low + high) / 2
            part = math.log(mid / before[x]) / math.log(after[x] / before[x]) if before[x] else mid / after[x]
            low, high = (mid, high) if before['valid_loss'] + part * (after['valid_loss'] - before['valid_loss']) > target else (low, mid)
        return high


def test_gains(whole, toy):
    data = whole[1]
    for cell in data['cells'].values():
        where, first = cell['reference'].split('/')
        for arm in cell['arms'].values():
            for run in arm['runs']:
                reference = next(r for r in data['cells'][where]['arms'][first]['runs'] if r['seed'] == run['seed'])
                for x in 'tokens', 'flops':
                    need = crossing(run['curve'], reference['final_loss'], x)
                    total, told = reference['curve'][-1][x], run[f'{x}_gain']
                    assert told is None if need is None else told == 'at once' if need == 0 else told == pytest.approx(total / need, rel=1e-6)
    assert all(data['cells']['a']['arms']['random']['runs'][0][k] == pytest.approx(1) for k in ('tokens_gain', 'flops_gain'))
    text = summary(data)
    assert all(name in text for name in ('a ', 'one-shot', 'cached', 'live')) and len(text.splitlines()) == 7


def test_gains_of_known_curves():
    point = lambda tokens, loss: dict(tokens=tokens, flops=10 * tokens + 5, valid_loss=loss)
    reference = dict(final_loss=2., curve=[point(0, 9.), point(100, 2.)])
    quick = [point(0, 9.), point(25, 2.)]
    assert gain(quick, reference, 'tokens') == 4 and gain(quick, reference, 'flops') == pytest.approx(1005 / 255)
    assert gain([point(0, 1.5)], reference, 'tokens') == 'at once' and gain([point(0, 1.5)], reference, 'flops') == 201
    assert gain([point(0, 9.), point(400, 2.01)], reference, 'tokens') is None


def test_more_seeds_and_cells_only_add(whole, toy, tmp_path, in_process, monkeypatch):
    out = copy(whole, tmp_path)
    old = {f: f.stat().st_mtime_ns for f in out.rglob('report/data.json')}
    read, losses = [], Study.losses
    monkeypatch.setattr(Study, 'losses', lambda self, model: [read.append(Path(model).parts[-5:]), losses(self, model)][1])
    more = replace(toy, seeds=[1, 2], cells=[*toy.cells, Cell('d', arms=['one-shot'], lrs_of='c', settings={'bin.tolerance': .2})])
    data = Study(more, out, quiet).run(only=['c', 'd'])
    assert read == [] and data['cells']['d']['arms']['one-shot']['runs'][0]['test'] is None                # not all cells were to be done
    runs = lambda d, cell: {name: a['runs'][0] for name, a in d['cells'][cell]['arms'].items()}
    for cell in 'a', 'b', 'c': assert runs(data, cell) == runs(whole[1], cell)
    assert [r['seed'] for r in data['cells']['c']['arms']['one-shot']['runs']] == [1, 2]
    assert all(f.stat().st_mtime_ns == t for f, t in old.items())
    data = Study(more, out, quiet).run(only=['c', 'd'], judge=True)
    names = [j['name'] for j in read_lines(out/'judged.jsonl')]
    assert len(names) == len({*names}) and names[9:] == ['d/teacher', 'c/seed-2/one-shot', 'd/seed-1/one-shot', 'd/seed-2/one-shot'] and len(read) == 4


# Work that fails or is stopped, with children in the place of real ones

def test_a_failure_stops_the_others_and_keeps_what_is_finished(whole, toy, tmp_path, monkeypatch):
    out, saved = copy(whole, tmp_path), []
    def work(self, job, threads):
        if job.which == 'seed-2':
            time.sleep(.2)
            raise ChildProcessError(f'the run in `{job.name}` ended with an error')
        while not self.stopping(): time.sleep(.01)
        saved.append(job.name)
        raise Stopped('stopped')
    monkeypatch.setattr(Study, 'work', work)
    (out/'study.json').unlink()
    with pytest.raises(ChildProcessError, match='a/seed-2'): Study(replace(toy, seeds=[1, 2, 3]), out, quiet).run(jobs=2)
    assert saved == ['a/seed-3'] and json.loads((out/'study.json').read_text())['cells'] == whole[1]['cells']


@pytest.mark.parametrize('how', ['minutes', 'stop'])
def test_time_is_up(how, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(Study, 'work', lambda self, job, threads: pytest.fail('begun though the time was up'))
    s = Study(toy, tmp_path/'s', quiet, stop=(lambda: True) if how == 'stop' else None)
    with pytest.raises(Stopped): s.run(minutes=1e-9 if how == 'minutes' else None)
    assert json.loads((tmp_path/'s'/'study.json').read_text())['cells'] == {}


def test_half_made_links_are_made_anew(tmp_path, monkeypatch):
    (tmp_path/'from').mkdir()
    for name in 'a', 'b': (tmp_path/'from'/name).write_text(name)
    monkeypatch.setattr(os, 'link', lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError): link_folder(tmp_path/'from', tmp_path/'to')
    assert not (tmp_path/'to').exists()
    def no_links(*a): raise OSError
    monkeypatch.setattr(os, 'link', no_links)
    link_folder(tmp_path/'from', tmp_path/'to')
    assert {f.name: f.read_text() for f in (tmp_path/'to').iterdir()} == dict(a='a', b='b') and not (tmp_path/'to.links').exists()


# Recipes of the package

def test_study_recipes_of_the_package():
    "What they name is there; each cell's recipe can be made; the reference of each is a random start."
    for name in 'study', 'study-gpu':
        r = load_recipe(name, cls=StudyRecipe)
        for c in r.cells:
            first = r.arms_of(r.cell(c.reference or c.name))[0]
            assert first.start == 'random' and r.recipe_of(c, 1, r.arms_of(c)).train.seed == 1
        assert r.texts == [*OTHERS] and len(r.seeds) >= 3
    steps = [r.recipe_of(c, 1, r.arms_of(c)).train for c in r.cells]
    tokens = [t.steps * t.tokens_per_step * len(r.arms_of(c)) * len(r.seeds) for t, c in zip(steps, r.cells)]
    assert [c.name for c in r.cells][:2] == ['base', 'long'] and tokens[0] >= 3e8 and steps[1].tokens == 4 * steps[0].tokens
    assert {t.tokens_per_step for t in steps} == {2**15} and {t.precision for t in steps} == {'bf16'}
    text = load_recipe('teacher-gpu', cls=TeacherRecipe).text
    assert (text.train, text.max_tokens, text.valid) == (r.base.text.train, r.base.text.max_tokens, r.base.text.valid)      # then its tokens serve both


@pytest.mark.slow
def test_every_cell_that_has_its_teacher_passes_its_check(tmp_path):
    r = load_recipe('study', cls=StudyRecipe)
    Study(r, tmp_path/'s', quiet).check([c.name for c in r.cells if c.settings.get('teacher', 'embedded') == 'embedded'])


def test_teachers_to_come(tmp_path, made):
    net = teacher_to_come('runs/teacher-gpu/model')
    assert 55e6 < net.count(net.full) < 70e6 and {p.device.type for p in net.model.parameters()} == {'meta'} and len(net.tokenizer) == net.sizes['vocab']
    assert teacher_to_come('embedded') is None and teacher_to_come(str(made/'teacher')) is None and teacher_to_come('no/such/model') is None
    assert teacher_to_come('EleutherAI/pythia-6.9b').count is not None
    r = load_recipe('teacher', ['--model.layers=2'], TeacherRecipe)
    (tmp_path/'recipe.yaml').write_text(recipe_yaml(r))
    assert teacher_to_come(str(tmp_path/'model')).sizes['layers'] == 2


# Children

def fake(monkeypatch, program):
    "A child that does what `program` says; its arguments are the folder and those of the command."
    monkeypatch.setattr(module, 'CHILD', 'import json, os, sys, pathlib\nfolder = pathlib.Path(sys.argv[1])\n' + program)

@pytest.fixture
def job(toy, tmp_path):
    s = Study(toy, tmp_path/'s', quiet)
    s.until, s.failed = math.inf, False
    return s, next(s.jobs())


@pytest.mark.skipif(sys.platform == 'win32', reason='children are interrupted otherwise there')
def test_a_child_that_fails_is_named_with_its_last_line(job, monkeypatch):
    s, j = job
    fake(monkeypatch, "print('a warning', file=sys.stderr); sys.exit('slm_begin: the disk is full\\n')")
    told = f'the run in `{s.out/j.name}` ended with an error (its log.txt tells more): slm_begin: the disk is full'
    with pytest.raises(ChildProcessError, match=re.escape(told)): s.work(j, 1)
    fake(monkeypatch, 'os.kill(os.getpid(), 9)')
    with pytest.raises(ChildProcessError, match='exit code -9'): s.work(j, 1)


def test_a_child_that_diverges_is_no_error(job, monkeypatch):
    "Once: the second time its arm is not asked for. What of the sweep was not tried goes on."
    s, j = job
    fake(monkeypatch, f"at = folder/'arms'/'{j.only[0]}'\nat.mkdir(parents=True)\n(at/'run.json').write_text('{{\"troubles\": [1]}}')\nsys.exit(2)")
    assert s.work(j, 1) > 0
    rest = next(s.jobs())
    assert rest.name == j.name and rest.only == j.only[1:]
    fake(monkeypatch, 'sys.exit(2)')
    with pytest.raises(ChildProcessError): s.work(rest, 1)


def test_a_child_is_told_to_stop_by_its_input(job, monkeypatch):
    s, j = job
    fake(monkeypatch, "(folder/'begun').touch()\nos.read(0, 1)\n(folder/'saved').touch()")
    s.stop = lambda: (s.out/j.name/'begun').exists()
    with pytest.raises(Stopped): s.work(j, 1)
    assert (s.out/j.name/'saved').exists()


def children(out):
    "Processes, alive, that work in the study's folder."
    found = []
    for proc in Path('/proc').glob('[0-9]*'):
        try: command, state = (proc/'cmdline').read_bytes().decode().split('\0'), (proc/'stat').read_text().rsplit(')')[1].split()[0]
        except OSError: continue
        if state != 'Z' and '-c' in command and any(a.startswith(str(out)) for a in command): found.append(int(proc.name))
    return found

def wait_for(what, seconds=60):
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end: time.sleep(.02)
    assert what()

def command(*args, env=None): return [sys.executable, '-m', 'slm_begin', *map(str, args)]

def start(*args): return subprocess.Popen(command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # a background job ignores it


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/cmdline').exists(), reason='looks for children in /proc')
def test_killed_and_stopped_for_good(base, tmp_path, one_thread):
    "The command itself: killed, its children save and end; stopped with Ctrl-C, likewise; then it ends as if nothing had been."
    arms = [replace(ARMS[0], lr=1e-3), replace(ARMS[1], lr=2e-3)]
    r = StudyRecipe('x', replace(base, arms=arms, train=replace(base.train, tokens=40_000, evals=3)), [Cell('a')], seeds=[1, 2], windows=2)
    (tmp_path/'r.yaml').write_text(recipe_yaml(r))
    out, args = tmp_path/'s', ('study', '--recipe', tmp_path/'r.yaml', '--out', tmp_path/'s', '--jobs', 2)
    seeds = lambda name: len(list(out.glob(f'a/seed-*/{name}')))
    p = start(*args)
    wait_for(lambda: seeds('arms/random/metrics.jsonl') == 2)
    assert len(children(out)) == 2
    p.kill()
    p.communicate()
    wait_for(lambda: not children(out))
    assert seeds('arms/*/checkpoints/step-*') == 2 and not (out/'study.json').exists()
    p = start(*args)
    wait_for(lambda: seeds('arms/one-shot/metrics.jsonl') or seeds('arms/random/final') == 2)
    p.send_signal(signal.SIGINT)
    err = p.communicate()[1]
    assert p.returncode == 130 and f'go on with: slm_begin study --resume --out {out}' in err and 'Traceback' not in err, err
    assert not children(out) and (out/'study.json').exists() and not (out/'judged.jsonl').exists()
    done = subprocess.run(command('study', '--resume', '--out', out, '--jobs', 2), capture_output=True, text=True)   # as many: then as many threads
    assert done.returncode == 0 and done.stdout.endswith(f'done: {out}/study.json\n') and len(read_lines(out/'judged.jsonl')) == 5, done.stderr
    for seed in 1, 2: pipeline.run(r.recipe_of(r.cells[0], seed, arms), tmp_path/f'seed-{seed}', say=quiet)
    for name in 'seed-1/arms/random', 'seed-2/arms/random', 'seed-1/arms/one-shot', 'seed-2/arms/one-shot':
        assert (out/'a'/name/'final'/'model.safetensors').read_bytes() == (tmp_path/name/'final'/'model.safetensors').read_bytes()
        assert last(out/'a'/name) == last(tmp_path/name)


@pytest.mark.slow
def test_a_real_child_that_fails(base, tmp_path):
    r = StudyRecipe('x', replace(base, arms=[replace(ARMS[0], lr=1e-3)]), [Cell('a')], seeds=[1, 2], windows=2)
    (tmp_path/'r.yaml').write_text(recipe_yaml(r))
    s = Study(r, tmp_path/'s', quiet)
    folder = s.out/'a'/'seed-2'
    s.make_folder([*s.jobs()][1])
    write_json(s.out/'recipe.yaml', {})
    (folder/'arms').write_text('in the way')
    done = subprocess.run(command('study', '--recipe', tmp_path/'r.yaml', '--out', s.out), capture_output=True, text=True)
    told = f'slm_begin: the run in `{folder}` ended with an error (its log.txt tells more): slm_begin: [Errno 20] Not a directory'
    assert done.returncode == 2 and done.stderr.startswith(told) and done.stderr.count('\n') == 1, done.stderr
    assert (s.out/'a'/'seed-1'/'report'/'data.json').exists() and 'Traceback' in (folder/'log.txt').read_text()


# The GPU study, tiny

SWEPT_AS_RANDOM = dict.fromkeys(['first-layers', 'one-shot', 'random-search', 'evolved', 'evolved-cached', 'evolved-live'], 'random')
TINY = dict(title='tiny', lrs=[1e-3, 2e-3, 4e-3], seeds=[1], windows=2, lr_like=SWEPT_AS_RANDOM)
TINY_BASE = {
    'train': dict(tokens=1024, seq_len=32, batch_size=8, evals=3, warmup_steps=1, precision='fp32'), 'evaluation': dict(windows=4, seq_len=32),
    'importance': dict(windows=2, seq_len=32), 'fitness': dict(windows=4, seq_len=32), 'space.round_to': dict(embd=16, heads=1, ffn=16),
    'search': dict(budget=dict(evaluations=6), population=4, elites=2, mutate=1, crossover=1, immigrants=1, finalists=2, niches=2),
    'cache.draws': 5, 'bin.tolerance': .2, 'samples.tokens': 4}
TINY_TEACHER = {
    'model': dict(embd=64, layers=3, heads=4, ffn=128, context=64), 'evaluation': dict(windows=4, seq_len=64), 'samples.tokens': 4,
    'train': dict(tokens=4096, seq_len=64, batch_size=8, warmup_steps=2, evals=3, compile=False, precision='fp32')}
BLOCKED = """import sys
from importlib import metadata
names, version = {'datasets', 'ipywidgets'}, metadata.version
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in names: raise ModuleNotFoundError(f"No module named '{name}'", name=name)
def hidden(name):
    if name in names: raise metadata.PackageNotFoundError(name)
    return version(name)
sys.meta_path.insert(0, Finder())
metadata.version = hidden
"""


@pytest.mark.slow
@pytest.mark.skipif(not all(map(shutil.which, ('bash', 'tar', 'xz', 'split'))), reason='a script for Linux')
def test_the_gpu_study_in_tiny_sizes(made, tmp_path):
    "runs/study_gpu.sh, step by step, where `datasets` and `ipywidgets` are missing, and after packing the text, too."
    write = lambda name, recipe: (tmp_path/name).write_text(recipe_yaml(recipe))
    s = load_recipe('study-gpu', cls=StudyRecipe)
    text = str(tmp_path/'novels.txt')
    shutil.copy(made/'train.txt', text)
    write('teacher-gpu.yaml', pipeline.changed(load_recipe('teacher-gpu', cls=TeacherRecipe), TINY_TEACHER | {'text.train': text}))
    settings = TINY_BASE | {'text.train': text, 'teacher': str(tmp_path/'runs'/'teacher-gpu'/'model')}
    cells = [replace(s.cell('base'), settings={}), Cell('more', arms=['random'], lrs_of='base')]
    write('study-gpu.yaml', replace(s, **TINY, base=pipeline.changed(s.base, settings), cells=cells))
    (tmp_path/'blocked').mkdir()
    (tmp_path/'blocked'/'sitecustomize.py').write_text(BLOCKED)
    at = dict(TEACHER='teacher-gpu.yaml', STUDY='study-gpu.yaml', RUNS='runs', PACK='pack', SITE='site', OUT='out', PYTHONPATH='blocked')
    env = dict(os.environ, PYTHON=sys.executable, JOBS='2', WHEELS='', NOVELS='', **{k: str(tmp_path/v) for k, v in at.items()})
    def step(*args, **more):
        done = subprocess.run(['bash', str(Path(__file__).parents[1]/'runs'/'study_gpu.sh'), *args], capture_output=True, text=True, env=env | more)
        return done.returncode, done.stdout + done.stderr
    assert subprocess.run([sys.executable, '-c', 'import datasets'], env=env, capture_output=True).returncode == 1
    code, said = step('pack')
    assert code == 0, said
    shutil.rmtree(tmp_path/'runs')
    os.unlink(text)
    code, said = step('unpack')
    assert code == 0 and 'not here yet' in said and re.search(r'base +7 +1 +10 +1,024', said), said
    code, said = step('study')
    assert code == 2 and 'no such folder' in said, said
    assert step('teacher', MINUTES='.0001')[0] == 130
    code, said = step('teacher')
    assert code == 0 and 'done: ' in said, said
    code, said = step('study', '--only', 'base', '--judge')
    assert code == 0 and said.rstrip().endswith('study-gpu/study.json') and 'evolved-live' in said, said
    code, said = step('results')
    assert code == 0, said
    data = json.loads((tmp_path/'out'/'study-gpu.json').read_text())
    base = data['cells']['base']
    assert len(base['arms']) == 7 and {*base['teacher']['test']} == {*OTHERS} and data['environment']['datasets'] is None
    assert all(len(a['runs']) == 1 and {*a['runs'][0]['test']} == {*OTHERS} for a in base['arms'].values())
    assert (tmp_path/'out'/'study-gpu.tar.gz').stat().st_size < 2e6
