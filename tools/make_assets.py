"""Make the embedded texts and tokenizer of `slm_begin/assets/`.

`python tools/make_assets.py ../shared/data` writes `novels-mini/{train,calib,valid,test,bible,manual}.parquet`, their list of works, and `tokenizer/`; with
names of splits behind the folder, only these. Novels come from the full ones in that folder, the Bible from the Debian packages bible-kjv and bible-kjv-text
(`apt-get download`), the manual from the Python that runs this: CPython 3.11.7 for the committed file. Run once; the result is committed, and nothing that
a user runs needs any of this.
"""
import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ASSETS = Path(__file__).parents[1] / 'slm_begin' / 'assets'
LICENCE = {'dbamman/litbank': 'text: public domain; LitBank corpus: CC BY 4.0',
           'computationalstylistics/100_english_novels': 'text: public domain',
           'COST-ELTeC/ELTeC-eng': 'text: public domain; ELTeC mark-up: CC BY 4.0',
           'debian/bible-kjv-text': 'text: public domain',
           'python/cpython': 'PSF-2.0, Copyright (c) Python Software Foundation, in PSF-LICENSE.txt'}
EOT = '<|endoftext|>'
NOVELS, OTHERS = ('train', 'calib', 'valid', 'test'), ('bible', 'manual')
VALID, TEST = 67_000, 50_000                 # characters of each held-out novel
TASKS_FROM = .78                             # the part of each held-out novel that is left for tools/make_tasks.py
BIBLE = ['Ruth', 'Esther', 'Ecclesiastes', 'Jonah', 'Mark']
MANUAL = {'types': 'The standard type hierarchy', 'specialnames': 'Special method names', 'compound': 'Compound statements', 'execmodel': 'Execution model'}


def excerpt(text, size, begin=None):
    "About `size` characters of `text` in whole sentences, by default after the first tenth (title pages, prefaces and contents)."
    if begin is None: begin = text.find('\n', int(len(text) * .1)) + 1 if len(text) > size / .9 else 0
    end = len(text) if len(text) <= begin + size else max(text.rfind('\n', begin, begin + size), text.rfind('. ', begin, begin + size) + 1)
    return text[begin:end].strip()


def after_valid(text):
    "What follows the validation excerpt of a held-out novel: at least the rest of a paragraph is left out in between, and the tasks' part is not touched."
    valid = excerpt(text, VALID)
    out = excerpt(text, TEST, text.find('\n', text.index(valid) + len(valid) + 1) + 1)
    assert text.index(out) + len(out) < TASKS_FROM * len(text)
    return out


def king_james():
    "Whole books of the King James Bible, a verse a line."
    with tempfile.TemporaryDirectory() as at:
        run = lambda *cmd, cwd=at: subprocess.run(cmd, cwd=cwd, check=True, capture_output=True, text=True, encoding='utf-8').stdout
        run('apt-get', '-o', 'APT::Sandbox::User=root', 'download', 'bible-kjv', 'bible-kjv-text')
        version, = {f.name.split('_')[1] for f in Path(at).glob('*.deb')}
        for f in Path(at).glob('*.deb'): run('dpkg', '-x', f.name, '.')
        for book in BIBLE:
            verses = [o.partition(' ') for o in run(f'{at}/usr/bin/bible', '-f', f'{book}1:1-99:99', cwd=f'{at}/usr/lib').splitlines() if o]
            assert verses[0][0].endswith('1:1') and len({re.match(r'\d*[A-Za-z]+', v[0])[0] for v in verses}) == 1
            yield dict(id=f'kjv-{book.lower()}', title=f'{book} (King James Version)', author='', year=1611, source=f'debian/bible-kjv-text {version}',
                       text='\n'.join(v[2] for v in verses))


def plain(topic):
    "A page of the manual as plain text: a paragraph a line, code as it is, no underlines and footnotes."
    out = []
    for block in re.split(r'\n\n+', topic.partition('-[ Footnotes ]-')[0].strip()):
        lines = [o for o in block.split('\n') if not re.fullmatch(r'\s*[*=~^-]{3,}', o)]
        wrapped = len({re.match(r' *(\* |\d+\. |\[\d+\] )?', o).end() for o in lines}) == 1 and all(len(o) > 45 for o in lines[:-1])
        out.append(' '.join(o.strip() for o in lines) if wrapped else '\n'.join(lines))
    return '\n\n'.join(out)


def manual():
    "Chapters of the Python language reference."
    from pydoc_data.topics import topics
    made = re.search(r'Sphinx on .*(\d{4})$', Path(sys.modules['pydoc_data.topics'].__file__).read_text(encoding='utf-8'), re.M)
    for name, title in MANUAL.items():
        yield dict(id=f'python-{name}', title=f'The Python language reference: {title}', author='Python Software Foundation', year=int(made[1]),
                   source='python/cpython ' + '.'.join(map(str, sys.version_info[:3])), text=plain(topics[name]))


def spread(books, n):
    "Of `books`, `n` that are spread evenly over sources and years, one author after another before any author comes twice."
    nth, order = {}, []
    for b in sorted(books, key=lambda b: (b['year'] or 0, b['id'])):
        key = (b['author'] or b['id']).split(',')[0].split()[0].lower()
        order.append((nth.setdefault(key, 0), b))
        nth[key] += 1
    order = [b for _, b in sorted(order, key=lambda o: o[0])][:max(n, sum(v > 0 for v in nth.values()))]
    return [order[int(i * len(order) / n)] for i in range(n)]


def write(split, rows):
    facts = 'id', 'title', 'author', 'year', 'source'
    rows = [{**{k: r[k] for k in facts}, 'licence': LICENCE[r['source'].split()[0]], 'text': r['text']} for r in rows]
    path = ASSETS / 'novels-mini' / f'{split}.parquet'
    pq.write_table(pa.Table.from_pylist(rows), path, compression='zstd', compression_level=19)
    chars = sum(len(r['text']) for r in rows)
    print(f"{split}: {len(rows)} works, {chars:,} characters, {path.stat().st_size:,} bytes")
    return [{**{k: v for k, v in r.items() if k != 'text'}, 'split': split, 'characters': len(r['text'])} for r in rows]


def novels(data):
    "The rows of the four splits of novels, whole excerpts."
    train, held_out = (pq.read_table(data / f'novels-{s}.parquet').to_pylist() for s in ('train', 'valid'))
    calib = spread([b for b in train if len(b['text']) > 120_000], 200)[5::20]   # 10 books that the training split does not hold
    held = {b['id'] for b in calib}
    chosen = spread([b for b in train if b['id'] not in held and len(b['text']) > 120_000], 120)
    cut = lambda books, part: [{**b, 'text': part(b['text'])} for b in books]
    return dict(train=cut(chosen, lambda t: excerpt(t, 100_000)), calib=cut(calib, lambda t: excerpt(t, 50_000)),
                valid=cut(held_out, lambda t: excerpt(t, VALID)), test=cut(held_out, after_valid))


def train_tokenizer(texts, vocab_size=4096):
    "Byte-level BPE, saved as a Hugging Face fast tokenizer."
    from transformers import PreTrainedTokenizerFast
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token=EOT, bos_token=EOT, unk_token=EOT, model_max_length=512, clean_up_tokenization_spaces=False)
    fast.save_pretrained(ASSETS / 'tokenizer')


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data', type=Path, help='folder with novels-train.parquet and novels-valid.parquet')
    p.add_argument('splits', nargs='*', choices=[*NOVELS, *OTHERS, []], help='which of them to make; all of them if none is named')
    args = p.parse_args()
    listed, splits = ASSETS / 'novels-mini' / 'works.json', args.splits or [*NOVELS, *OTHERS]
    listed.parent.mkdir(parents=True, exist_ok=True)
    works = {s: [w for w in json.loads(listed.read_text(encoding='utf-8')) if w['split'] == s] if listed.exists() else [] for s in (*NOVELS, *OTHERS)}
    rows = novels(args.data) if {*splits} & {*NOVELS} else {}
    for s in splits: works[s] = write(s, rows[s] if s in rows else list(dict(bible=king_james, manual=manual)[s]()))
    listed.write_text(json.dumps([w for ws in works.values() for w in ws], indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    if 'manual' in splits: shutil.copyfile(Path(json.__file__).parents[1] / 'LICENSE.txt', listed.parent / 'PSF-LICENSE.txt')
    if 'train' in splits: train_tokenizer([r['text'] for r in rows['train']])
