"cli: help without torch, one line for an error, exit codes, Ctrl-C, and the commands at work on a tiny teacher."
# ruff: noqa: F811  (fixtures that come from test_pipeline)
import json
import re
import signal
import subprocess
import sys
import time

import pytest
from test_pipeline import flags, made, no_figures, recipe  # noqa: F401

from slm_begin import __version__
from slm_begin.cli import COMMANDS, arguments, main, overview
from slm_begin.pipeline import recipe_yaml


def python(*args, **kw): return subprocess.run([sys.executable, *args], capture_output=True, text=True, **kw)


def test_help_is_fast_and_without_torch():
    heavy = "bool({'torch', 'transformers', 'datasets', 'matplotlib'} & {*sys.modules})"
    program = f"import sys, slm_begin.cli as c; r = c.main(sys.argv[1:]); sys.exit(r or 10 * {heavy})"
    for args in ['--help'], ['--version'], [], ['help']: assert python('-c', program, *args).returncode == 0
    assert python('-c', program, 'rnu').returncode == 2


def test_python_m():
    done = python('-m', 'slm_begin', '--help')
    assert done.returncode == 0 and done.stdout == overview() + '\n' and all(name in done.stdout for name in COMMANDS)
    assert python('-m', 'slm_begin', '--version').stdout == f'slm_begin {__version__}\n'


@pytest.mark.parametrize('name', COMMANDS)
def test_help_of_each_command(name, capsys):
    assert main([name, '--help']) == 0
    out = ' '.join(capsys.readouterr().out.split())
    assert out.startswith(f'usage: slm_begin {name} [flags]') and COMMANDS[name].__doc__ in out and '--debug' in out
    if name in ('run', 'train-teacher'): assert 'Go on with the run in the folder' in out and 'Peak learning rate (type: float' in out


@pytest.mark.parametrize('args, message', [
    (['rnu'], 'there is no command `rnu`: did you mean `run`?'),
    (['xyz'], 'there is no command `xyz`: there are run, search, cache-teacher, pretrain, plan'),
    (['run', '--recipe', 'no-such'], 'there is no recipe `no-such`, neither as a file nor in the package'),
    (['run', '--resmue'], 'there is no flag `--resmue`: did you mean `--resume`?'),
    (['run', '--train.lr', '9'], '`train.lr` is 9.0; it must lie between 0 and 1'),
    (['run', '--train.lr', 'fast'], "`train.lr` is 'fast'; it must be of the type float"),
    (['run', '--recipe', 'teacher'], 'it is a recipe for `slm_begin train-teacher`'),
    (['train-teacher', '--recipe', 'demo'], 'it is a recipe for `slm_begin run`'),
    (['run', '--resume', '--out', 'no/such/run'], '`no/such/run` holds no run to go on with'),
    (['plan', '--teacher', 'no/such/model/folder'], 'model `no/such/model/folder`: no such folder'),
    (['plan', '--bin.fraction', '.001'], 'Reachable are'),
    (['report', 'no/such/run'], '`no/such/run` is not a run folder'),
    (['generate', 'x', '--model', './nothing'], 'model `./nothing`: no such folder'),
    (['generate', 'x', '--temperature', '-1', '--model', '{teacher}'], '`temperature` is -1.0'),
    (['generate', 'x', 'y'], 'unexpected argument `y`'),
    (['recipes', 'no-such'], 'there is no recipe `no-such`'),
])
def test_errors_are_one_line(args, message, made, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([a.replace('{teacher}', str(made/'teacher')) for a in args]) == 2
    err = capsys.readouterr().err
    assert err.startswith('slm_begin: ') and message in err and err.count('\n') == 1
    assert not list(tmp_path.iterdir())


def test_debug_and_mistakes_of_our_own(capsys, monkeypatch):
    assert main(['report', 'no/such/run', '--debug']) == 2 and 'Traceback' in capsys.readouterr().err
    monkeypatch.setattr('slm_begin.pipeline.make_report', lambda folder: {}['oops'])
    assert main(['report', 'x']) == 1
    assert capsys.readouterr().err == "slm_begin: KeyError: 'oops' (this is a mistake in slm_begin; `--debug` shows where)\n"


def test_recipes(capsys):
    assert main(['recipes']) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf'^{name} ', out, re.M) for name in ('demo', 'tiny', 'teacher'))
    assert main(['recipes', 'demo']) == 0 and 'arms:' in capsys.readouterr().out


def test_arguments(flags, tmp_path):
    got = arguments('run', ['--recipe', 'tiny', *flags, '--out', 'x', '--resume'])
    assert (got['out'], got['resume'], got['recipe']) == ('x', True, 'tiny') and got['settings'].train.tokens == 2048
    assert arguments('train-teacher', ['--train.tokens', '99'])['settings'].train.tokens == 99


def test_plan_run_report_generate(recipe, tmp_path, capsys, monkeypatch):
    "The commands in their order, as a user would."
    monkeypatch.chdir(tmp_path)
    (tmp_path/'mine.yaml').write_text(recipe_yaml(recipe), encoding='utf-8')
    assert main(['plan', '--recipe', 'mine.yaml']) == 0
    assert 'arm evolved-kd' in capsys.readouterr().out and not (tmp_path/'runs').exists()
    assert main(['run', '--recipe', 'mine.yaml']) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == 'done: runs/mine/report/index.html' and '[11/11] report' in out
    for args in ['--recipe', 'mine.yaml', '--resume'], ['--resume', '--out', 'runs/mine']:
        assert main(['run', *args]) == 0 and '10 of 11 stages are finished already' in capsys.readouterr().out
    for args in ['--recipe', 'mine.yaml', '--train.lr', '1e-3', '--out', 'runs/mine'], ['--resume', '--out', 'runs/mine', '--train.lr', '1e-3']:
        assert main(['run', *args]) == 2 and 'train.lr (0.002 there, 0.001 here)' in capsys.readouterr().err
    assert main(['report', 'runs/mine']) == 0 and capsys.readouterr().out == 'runs/mine/report/index.html\n'
    texts = []
    for _ in range(2):
        assert main(['generate', 'It was', '--model', 'runs/mine/arms/evolved-kd/final', '--tokens', '8', '--seed', '3']) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith('It was')


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == 'win32', reason='no SIGINT for a child there')
def test_ctrl_c(recipe, tmp_path):
    "Saves, says how to go on, exits with 130; and goes on."
    out = tmp_path/'run'
    (tmp_path/'r.yaml').write_text(recipe_yaml(recipe), encoding='utf-8')
    for wait_for in 'search/history.jsonl', 'arms/one-shot/metrics.jsonl':
        p = subprocess.Popen([sys.executable, '-m', 'slm_begin', 'run', '--recipe', str(tmp_path/'r.yaml'), '--out', str(out)],
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # a background job ignores it
        while p.poll() is None and not list(out.glob(wait_for)): time.sleep(.01)
        p.send_signal(signal.SIGINT)
        err = p.communicate()[1]
        assert p.returncode == 130 and f'go on with: slm_begin run --resume --out {out}' in err and 'Traceback' not in err, err
    done = python('-m', 'slm_begin', 'run', '--resume', '--out', str(out))
    assert done.returncode == 0, done.stderr
    assert len(json.loads((out/'report'/'data.json').read_text(encoding='utf-8'))['arms']) == 4
