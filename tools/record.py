"""Keep what a run measured, for the notebooks that show it: `nbs/results/`.

`python tools/record.py demo runs/demo` keeps the report's data and what was printed (without the lines of progress).
`python tools/record.py demo-sweep runs/sweep` keeps each arm's curve, and writes the best learning rates into the recipe `demo`.
`python tools/record.py study runs/study` keeps what tables and figures need of a study, under the name of its folder.
`python tools/record.py families` asks of every causal language model in transformers whether it can be a super-network (some minutes).
"""
import argparse
import json
import re
from pathlib import Path

root = Path(__file__).parent.parent
results, recipes = root/'nbs'/'results', root/'slm_begin'/'recipes'

def demo(run):
    (results/'demo.json').write_text((run/'report'/'data.json').read_text(encoding='utf-8'), encoding='utf-8')
    lines = [re.sub(r'^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ', '', o) for o in (run/'log.txt').read_text(encoding='utf-8').splitlines()]
    first = next(i for i,o in enumerate(lines) if o.startswith('[1/'))
    shown = [o for o in lines[first:] if 'tokens/s' not in o and not re.search(r'\] (resumed at|tokenising|importance: )| \(\d+%\)', o)]
    (results/'demo-printed.txt').write_text('\n'.join(shown) + '\n', encoding='utf-8')

def sweep(run):
    data = json.loads((run/'report'/'data.json').read_text(encoding='utf-8'))
    arms = [{k: a[k] for k in ('name', 'start', 'objective', 'lr', 'final_loss', 'curve')} for a in data['arms']]
    out = dict(recipe='demo-sweep', command='slm_begin run --recipe demo-sweep --out runs/sweep', environment=data['environment'], teacher=data['teacher'],
               tokens=arms[0]['curve'][-1]['tokens'], arms=arms)
    (results/'demo-sweep.json').write_text(json.dumps(out) + '\n', encoding='utf-8')
    recipe = recipes/'demo.yaml'
    recipe.write_text(re.sub(r'^- \{name: ([\w-]+),.*\}$', lambda m: tuned(m[0], m[1], arms), recipe.read_text(encoding='utf-8'), flags=re.M), encoding='utf-8')

def study(run):
    (results/f'{run.name}.json').write_text((run/'study.json').read_text(encoding='utf-8'), encoding='utf-8')

def tuned(line, name, arms):
    "The recipe's line of an arm with the learning rate whose final loss is least, and what each of them reached."
    tried = sorted((a['lr'], round(a['final_loss'], 4)) for a in arms if re.fullmatch(rf'{name}-\de-\d', a['name']))
    best = min(tried, key=lambda o: o[1])
    if best in (tried[0], tried[-1]): print(f"{name}: the best learning rate, {best[0]}, is at the edge of what was tried; extend the sweep")
    return re.sub(r'lr: .*\}$', f'lr: {best[0]}, lr_sweep: {json.dumps([*map(list, tried)])}}}', line)

def ask(family):
    "Can an architecture with its default config be a super-network? Its model's class, and how many parameters were named, or why not."
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    from slm_begin.supernet import TEACH, NotASupernet, infer_axes
    try: return dict(model=known[family], parameters=len(infer_axes(transformers.CONFIG_MAPPING[family]()).dims))
    except NotASupernet as e: return dict(model=known[family], reason=str(e).removesuffix(TEACH))
    except Exception as e: return dict(model=known[family], reason=f'its default config cannot be used: {type(e).__name__}: {str(e)[:150]}')

def families(_):
    import logging
    import warnings

    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known
    warnings.filterwarnings('ignore')
    logging.disable(logging.WARNING)
    out = {family: ask(family) for family in sorted(known)}
    data = dict(command='python tools/record.py families', transformers=transformers.__version__, families=out)
    (results/'families.json').write_text(json.dumps(data, indent=0) + '\n', encoding='utf-8')
    print(f"{sum('parameters' in o for o in out.values())} of {len(out)} architectures qualify")

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=['demo', 'demo-sweep', 'study', 'families'])
    p.add_argument('run', type=Path, nargs='?', help='the folder of a finished run')
    a = p.parse_args()
    if a.what!='families' and a.run is None: p.error(f'{a.what} needs the folder of a finished run')
    {'demo': demo, 'demo-sweep': sweep, 'study': study, 'families': families}[a.what](a.run)
