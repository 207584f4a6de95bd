"settings.ini, constraints.txt and the wheel say the same, and the package works outside the repository."
import configparser
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

root = Path(__file__).parent.parent
ini = configparser.ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
wanted = [Requirement(o) for k,v in cfg.items() if k=='requirements' or k.endswith('_requirements') for o in shlex.split(v)]
pins = [Requirement(o) for o in (root/'constraints.txt').read_text().splitlines() if o and o[0]!='#']


@pytest.mark.parametrize('python', ['3.10.13', '3.11.7', '3.12.1', '3.13.0'])
def test_constraints_hold_one_version_that_each_requirement_admits(python):
    env = dict(python_version=python.rpartition('.')[0], python_full_version=python, sys_platform='linux')
    at = {}
    for p in pins:
        if p.marker and not p.marker.evaluate(env): continue
        name = canonicalize_name(p.name)
        assert name not in at, f"{name} is pinned twice for Python {python}"
        at[name] = str(p.specifier).removeprefix('==')
    for r in wanted:
        assert canonicalize_name(r.name) in at, f"{r.name} is in settings.ini but not in constraints.txt: run `make lock`"
        v = at[canonicalize_name(r.name)]
        assert r.specifier.contains(v), f"constraints.txt has {r.name} {v}, settings.ini wants {r}"


def test_the_package_caps_nothing():
    for r in map(Requirement, shlex.split(cfg['requirements'])):
        assert all(o.operator=='>=' for o in r.specifier), f"{r}: caps belong in dev_requirements or constraints.txt"


def test_import_is_light():
    heavy = "torch transformers datasets ipywidgets matplotlib pandas"
    code = f"import sys, slm_begin; print([o for o in '{heavy}'.split() if o in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout.strip()=='[]'


@pytest.mark.slow
def test_wheel_has_everything_and_works_outside_the_repository(tmp_path):
    src = tmp_path/'src'  # a copy, so that no build/ or egg-info stays in the working tree
    skip = shutil.ignore_patterns('.*', '_*', 'runs', 'build', 'dist', '*.egg-info', 'nbs', 'tests')
    shutil.copytree(root, src, ignore=lambda d,names: skip(d, names) if Path(d)==root else [o for o in names if o=='__pycache__'])
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q']
    subprocess.run([*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp_path, src], check=True)
    wheel, = tmp_path.glob('*.whl')
    with zipfile.ZipFile(wheel) as z:
        got = set(z.namelist())
        meta = z.read(next(o for o in got if o.endswith('dist-info/METADATA'))).decode()
    shipped = {o.relative_to(root).as_posix() for o in (root/'slm_begin').rglob('*') if o.is_file() and '__pycache__' not in o.parts
               and (o.suffix=='.py' or 'assets' in o.parts or 'recipes' in o.parts)}
    assert shipped <= got, f"missing from the wheel: {sorted(shipped-got)}"
    assert not [o for o in got if o.split('/')[0] not in ('slm_begin', wheel.name.split('-py3')[0] + '.dist-info')]
    assert 'License-Expression: Apache-2.0' in meta and f"Requires-Python: >={cfg['min_python']}" in meta
    assert any(o.endswith('licenses/LICENSE') for o in got)

    subprocess.run([*pip, 'install', '--no-deps', '--target', tmp_path/'site', wheel], check=True)
    code = "import slm_begin, sys; print(slm_begin.__file__, slm_begin.__version__)"
    env = {'PYTHONPATH': str(tmp_path/'site')}
    out = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, check=True, capture_output=True, text=True).stdout
    assert out.split()==[str(tmp_path/'site'/'slm_begin'/'__init__.py'), cfg['version']]
