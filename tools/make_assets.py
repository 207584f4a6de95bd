"""Make the embedded corpus and tokenizer of `slm_begin/assets/` from the full novels.

`python tools/make_assets.py ../shared/data` writes `novels-mini/{train,calib,valid}.parquet`, their list of works, and `tokenizer/`.
Run once; the result is committed, and nothing that a user runs needs the full novels.
"""
import argparse
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ASSETS = Path(__file__).parents[1] / 'slm_begin' / 'assets'
LICENCE = {'dbamman/litbank': 'text: public domain; LitBank corpus: CC BY 4.0',
           'computationalstylistics/100_english_novels': 'text: public domain',
           'COST-ELTeC/ELTeC-eng': 'text: public domain; ELTeC mark-up: CC BY 4.0'}
EOT = '<|endoftext|>'


def excerpt(text, size, start=.1):
    "About `size` characters of `text` in whole sentences, after the first tenth (title pages, prefaces and contents)."
    begin = text.find('\n', int(len(text) * start)) + 1 if len(text) > size / (1 - start) else 0
    end = len(text) if len(text) <= begin + size else max(text.rfind('\n', begin, begin + size), text.rfind('. ', begin, begin + size) + 1)
    return text[begin:end].strip()


def spread(books, n):
    "Of `books`, `n` that are spread evenly over sources and years, one author after another before any author comes twice."
    nth, order = {}, []
    for b in sorted(books, key=lambda b: (b['year'] or 0, b['id'])):
        key = (b['author'] or b['id']).split(',')[0].split()[0].lower()
        order.append((nth.setdefault(key, 0), b))
        nth[key] += 1
    order = [b for _, b in sorted(order, key=lambda o: o[0])][:max(n, sum(v > 0 for v in nth.values()))]
    return [order[int(i * len(order) / n)] for i in range(n)]


def write(split, books, size):
    facts = 'id', 'title', 'author', 'year', 'source'
    rows = [{**{k: b[k] for k in facts}, 'licence': LICENCE[b['source']], 'text': excerpt(b['text'], size)} for b in books]
    path = ASSETS / 'novels-mini' / f'{split}.parquet'
    pq.write_table(pa.Table.from_pylist(rows), path, compression='zstd', compression_level=19)
    chars = sum(len(r['text']) for r in rows)
    print(f"{split}: {len(rows)} books, {chars:,} characters, {path.stat().st_size:,} bytes")
    return [{**{k: v for k, v in r.items() if k != 'text'}, 'split': split, 'characters': len(r['text'])} for r in rows]


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
    data = p.parse_args().data
    (ASSETS / 'novels-mini').mkdir(parents=True, exist_ok=True)
    train, valid = (pq.read_table(data / f'novels-{s}.parquet').to_pylist() for s in ('train', 'valid'))
    calib = spread([b for b in train if len(b['text']) > 120_000], 200)[5::20]   # 10 books that the training split does not hold
    held = {b['id'] for b in calib}
    chosen = spread([b for b in train if b['id'] not in held and len(b['text']) > 120_000], 120)
    works = write('train', chosen, 100_000) + write('calib', calib, 50_000) + write('valid', valid, 67_000)
    (ASSETS / 'novels-mini' / 'works.json').write_text(json.dumps(works, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    train_tokenizer([r['text'] for r in pq.read_table(ASSETS / 'novels-mini' / 'train.parquet').to_pylist()])
