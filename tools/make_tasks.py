"""Make the two tasks of `slm_begin/assets/tasks/` from novels that no one trained on.

`python tools/make_tasks.py ../shared/data` writes `cloze.jsonl` and `endings.jsonl`. Run once; the result is committed. Of each of the 9 held-out novels only
what comes after `TASKS_FROM` of its text is used: the splits `valid` and `test` of the embedded corpus end before.
How an item is made is told in `slm_begin/assets/tasks/README.md`; no model has a say in which items there are.
"""
import argparse
import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

TASKS = Path(__file__).parents[1] / 'slm_begin' / 'assets' / 'tasks'
TASKS_FROM, TASKS_TO = .78, .97        # Of each novel's text; at its very end there may be an editor's note
PER_NOVEL = dict(cloze=50, endings=35)       # At most
CHOICES = 4
COMMON = 100                # So many words are too common to be asked for: the, was, little, ...
TITLES = r'(?:\b(?:Mr|Mrs|Dr|St|Messrs|No|Esq|Col|Capt)|\b[A-HJ-Z])\.$'
SPEECH = '"“'


def sentences(paragraph):
    "The sentences of a paragraph: cut after . ! or ? and closing quotation marks, before a capital letter."
    out = []
    for part in re.split(r'(?<=[.!?])(?=\s)|(?<=[.!?]["”’\'])(?=\s)', paragraph.strip()):
        part = part.strip()
        begins = re.match(r'["“‘\'(]*[A-Z]', part)
        if out and (not begins or re.search(TITLES, out[-1])): out[-1] += ' ' + part
        elif part: out.append(part)
    return out


def words(text): return re.findall(r"[A-Za-z]+(?:['’][a-z]+)?", text)


def balanced(text): return text.count('"') % 2 == 0 and text.count('“') == text.count('”')


def alike(a, b): return a[:4] == b[:4]


def cloze(novel, novels, rng):
    """Passages that break off before the last word of a clause, which stands in them before; the other choices are words of the passage, too,
    about as often in it and in novels."""
    count, lower = (Counter(w for text in novels for w in words(change(text))) for change in (str, str.lower))
    common = {w for w, _ in count.most_common(COMMON)}
    asked = lambda w: w.islower() and w.isalpha() and len(w) > 3 and w not in common and count[w] > lower[w] / 2          # names are not
    parts = [s + end for paragraph in novel for *most, last in [sentences(paragraph)] for s, end in [*((s, ' ') for s in most), (last, '\n')]]
    for i, part in enumerate(parts):
        for clause in re.finditer(r' ([a-z]+)(?=[.,;:!?])', part):
            start, word, context = i, clause[1], part[:clause.start()]
            while start and len(context) < 280: context = parts[start := start - 1] + context
            before, last = Counter(words(context)), context.rfind(f' {word}')
            if not 280 <= len(context) <= 380 or not asked(word) or not before[word] or last > len(context) - 40: continue
            others = []
            for w in sorted(filter(asked, before), key=lambda w: (abs(before[w] - before[word]), abs(math.log(count[w] / count[word])), w)):
                if not any(alike(w, o) for o in (word, *others)): others.append(w)
            choices = shuffled([word, *others[:CHOICES - 1]], rng)
            if len(others) >= CHOICES - 1: yield dict(context=context, choices=choices, answer=choices.index(word))


def endings(novel, novels, rng):
    "A passage and four sentences, of which one follows; the others are of the same length and kind, from other places of the novel."
    known = [(i, s) for i, paragraph in enumerate(novel) for s in sentences(paragraph)]
    pool = [(i, s) for i, s in known if 35 <= len(s) <= 80 and balanced(s)]
    for i, paragraph in enumerate(novel):
        parts = sentences(paragraph)
        for end in range(1, len(parts)):
            start = end
            while start and len(' '.join(parts[start:end])) < 100: start -= 1
            context, true = ' '.join(parts[start:end]), parts[end]
            if not 100 <= len(context) <= 220 or (i, true) not in pool or not balanced(context): continue
            shortest = len(true) - rng.randrange(13)                    # else the true one would be of middle length too often
            others = [s for j, s in pool if abs(i - j) > 3 and shortest <= len(s) <= shortest + 12 and (s[0] in SPEECH) == (true[0] in SPEECH)
                      and s[-1] == true[-1] and s != true]
            if len(set(others)) < CHOICES - 1: continue
            choices = shuffled([true, *rng.sample(sorted(set(others)), CHOICES - 1)], rng)
            yield dict(context=context, choices=choices, answer=choices.index(true))


def shuffled(choices, rng): return rng.sample(choices, len(choices))


def pick(items, n):
    "At most `n` items spread evenly over those that there are, no two of them from the same place."
    apart = []
    for item in items:
        if not apart or apart[-1]['context'][-60:] not in item['context'] and item['context'][:60] not in apart[-1]['context']: apart.append(item)
    n = min(n, len(apart))
    return [apart[i * len(apart) // n] for i in range(n)]


def write(name, make, books):
    novels = {b['id']: b['text'][int(len(b['text']) * TASKS_FROM):int(len(b['text']) * TASKS_TO)].split('\n')[1:-1] for b in books}
    texts = ['\n'.join(novel) for novel in novels.values()]
    rng, nth = random.Random(0), []
    for id, novel in novels.items(): nth += enumerate(dict(work=id, **item) for item in pick(list(make(novel, texts, rng)), PER_NOVEL[name]))
    rows = [item for _, item in sorted(nth, key=lambda o: o[0])]         # the novels take turns, so that the first few items are of all
    path = TASKS / f'{name}.jsonl'
    path.write_text(''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows), encoding='utf-8')
    print(f"{name}: {len(rows)} items, {path.stat().st_size:,} bytes")


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data', type=Path, help='folder with novels-valid.parquet')
    books = pq.read_table(p.parse_args().data / 'novels-valid.parquet').to_pylist()
    TASKS.mkdir(parents=True, exist_ok=True)
    for task in cloze, endings: write(task.__name__, task, books)
