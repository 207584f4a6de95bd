"data: where text may come from and what may be wrong with it, tokens on disk after a kill, and the law that an epoch sees every token once."
import contextlib
import gzip
import http.server
import importlib.util
import itertools
import json
import os
import pickle
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_model, write_tokens

from slm_begin import data
from slm_begin.data import (
    OTHERS,
    SPLITS,
    Batches,
    Mixture,
    Stopped,
    Tokens,
    _pieces,
    append_line,
    document_positions,
    held_out,
    load_corpus,
    load_tokenizer,
    no_network_hint,
    overlap,
    parse_mixture,
    prepare,
    prepare_text,
    read_lines,
    tokenize,
    tokenizer_hash,
)

docs = ['The first document.\nIt has “two” lines.\n', 'A second — naïve — one.', '日本語 🙂\n\n  spaces\tand tabs ', 'x' * 3000]


@pytest.fixture(scope='module')
def corpora(tmp_path_factory):
    "The same documents in every readable form."
    at = tmp_path_factory.mktemp('corpora')
    (at/'texts').mkdir()
    for i,d in enumerate(docs): (at/'texts'/f'{i}.txt').write_text(d, encoding='utf-8')
    rows = [json.dumps(dict(text=d, n=i), ensure_ascii=i%2==0) + '\n' for i,d in enumerate(docs)]
    (at/'one.jsonl').write_text(''.join(rows), encoding='utf-8')
    (at/'two').mkdir()
    for name,part in dict(a=rows[:1], b=rows[1:]).items(): (at/'two'/f'{name}.jsonl').write_text(''.join(part), encoding='utf-8')
    (at/'array.json').write_text(json.dumps([dict(text=d) for d in docs]))
    pq.write_table(pa.table(dict(text=docs, n=range(4))), at/'one.parquet', row_group_size=3, compression='zstd')
    (at/'deep'/'er').mkdir(parents=True)
    for i,d in enumerate(docs): pq.write_table(pa.table(dict(text=[d])), at/'deep'/'er'/f'{i}.parquet')
    return at


def ids_of(folder): return Tokens(folder).read(0, len(Tokens(folder)))


@pytest.mark.parametrize('name', ['texts', 'one.jsonl', 'two', 'array.json', 'one.parquet', 'deep'])
def test_every_form_of_a_corpus_gives_the_same_tokens(corpora, tok, tmp_path, name):
    man = tokenize(load_corpus(corpora/name), tok, tmp_path/'a')
    want = tokenize(docs, tok, tmp_path/'b')
    assert man==want and (ids_of(tmp_path/'a')==ids_of(tmp_path/'b')).all()
    assert tok.decode(ids_of(tmp_path/'a').tolist())==''.join(d + tok.eos_token for d in docs)


@pytest.mark.parametrize('suffix', ['.gz', '.zst'])
def test_packed_files(corpora, tok, tmp_path, suffix):
    if suffix=='.zst':
        from fsspec.compression import compr
        if 'zstd' not in compr:
            (tmp_path/'a.txt.zst').write_bytes(b'x')
            with pytest.raises(ValueError, match='`.zst` files need another package: `pip install zstandard`'): load_corpus(tmp_path)
            return
        pack = lambda path, content: compr['zstd'](open(path, 'wb'), mode='wb').write(content)
    else: pack = lambda path, content: path.write_bytes(gzip.compress(content))
    want = tokenize(docs, tok, tmp_path/'want').text
    for name in 'one.jsonl', 'array.json', 'texts':
        (tmp_path/name).mkdir()
        for f in sorted((corpora/name).iterdir()) if (corpora/name).is_dir() else [corpora/name]: pack(tmp_path/name/(f.name + suffix), f.read_bytes())
        assert tokenize(load_corpus(tmp_path/name), tok, tmp_path/'got').text==want
    (tmp_path/'cut.jsonl.gz').write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    with pytest.raises(ValueError, match=r'cut.jsonl.gz` cannot be read as json: after \d+ rows: '): list(load_corpus(tmp_path/'cut.jsonl.gz'))


def test_every_position_can_be_gone_on_from(corpora, monkeypatch):
    monkeypatch.setattr(data, 'PIECE', 1000)
    for name in 'texts', 'one.jsonl', 'two', 'array.json', 'one.parquet', 'deep':
        corpus = load_corpus(corpora/name)
        rows = list(corpus.rows(columns=['text']))
        for n in range(1, len(rows) + 1):
            for _ in zip(range(n), corpus, strict=False): pass
            assert list(load_corpus(corpora/name).rows(json.loads(json.dumps(corpus.position)), ['text']))==rows[n:]
        assert corpus.part==1


def test_a_folder_laid_out_like_a_hub_repository(tok, tmp_path):
    "Its README.md names configurations and splits, and they are used; positions and tokens are as for plain files."
    repo = tmp_path/'repo'
    (repo/'data').mkdir(parents=True)
    for split, part in dict(train=docs[:3], validation=docs[3:]).items():
        for i, d in enumerate(part): pq.write_table(pa.table(dict(text=[d, f'{split} {i}'], n=[1, 2])), repo/'data'/f'{split}-{i:05}-of-{len(part):05}.parquet')
    files = ''.join(f'  - split: {s}\n    path: data/{s}-*\n' for s in ('train', 'validation'))
    (repo/'README.md').write_text(f'---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n# A corpus\n')
    train = [t for i, d in enumerate(docs[:3]) for t in (d, f'train {i}')]
    corpus = load_corpus(repo)
    assert [r['text'] for r in corpus]==train and [r['text'] for r in load_corpus(repo, 'validation')]==[docs[3], 'validation 0']
    for n in range(1, 6):
        for _ in zip(range(n), corpus.rows(columns=['text']), strict=False): pass
        assert [r['text'] for r in load_corpus(repo).rows(json.loads(json.dumps(corpus.position)), ['text'])]==train[n:]
    assert tokenize(load_corpus(repo), tok, tmp_path/'a').text==tokenize(train, tok, tmp_path/'b').text
    with pytest.raises(ValueError, match=r"Bad split: test. Available splits: \['train', 'validation'\]"): load_corpus(repo, 'test')
    with pytest.raises(ValueError, match='has no column `body`; it has text, n'): load_corpus(repo, column='body')
    (tmp_path/'texts').mkdir()
    (tmp_path/'texts'/'README.md').write_text('---\nlicense: mit\n---\n')
    for i, d in enumerate(docs): (tmp_path/'texts'/f'{i}.txt').write_text(d)
    assert [r['text'] for r in load_corpus(tmp_path/'texts')]==docs
    (repo/'data'/'train-00002-of-00003.parquet').write_bytes(b'PAR1 and nothing more PAR1')
    with pytest.raises(ValueError, match='`.*repo` cannot be read to its end, after 4 rows'): list(load_corpus(repo))


def test_a_text_file_is_one_document(tok, tmp_path):
    (tmp_path/'a.txt').write_text('one\n\ntwo\n' * 1000)
    man = tokenize(load_corpus(tmp_path/'a.txt'), tok, tmp_path/'tokens')
    assert man.documents==1 and man.characters==9000


# What may be wrong with a corpus

def damaged(kind, path):
    pq.write_table(pa.table(dict(text=docs)), path, compression='zstd')
    data = bytearray(path.read_bytes())
    if kind=='cut': data = data[:len(data)//2]
    if kind=='not one': data = b'PAR1 nonsense' * 50
    if kind=='flipped': data[20:120] = bytes(100)
    path.write_bytes(data)


@pytest.mark.parametrize('kind', ['cut', 'not one', 'flipped'])
def test_damaged_parquet(tok, tmp_path, kind):
    damaged(kind, tmp_path/'bad.parquet')
    with pytest.raises(ValueError, match='cannot be read'): tokenize(load_corpus(tmp_path/'bad.parquet'), tok, tmp_path/'tokens')
    assert not (tmp_path/'tokens').exists()


@pytest.mark.parametrize('name,content,message', [
    ('latin.txt', 'café'.encode('latin1'), "`.*latin.txt` cannot be read as text: after 0 rows: 'utf-8' codec"),
    ('empty.txt', b'', 'empty.txt` is empty'), ('empty.jsonl', b'', 'is empty'), ('empty.parquet', b'', 'is empty'),
    ('broken.jsonl', b'{"text": "a"}\n{"text": oops\n', 'broken.jsonl` cannot be read as json'),
    ('other.jsonl', b'{"body": "a", "n": 1}\n', 'has no column `text`; it has body, n'),
    ('table.csv', b'text\na\n', 'has the suffix `.csv`; readable are .txt')])
def test_unreadable_files(tmp_path, name, content, message):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(ValueError, match=message): load_corpus(tmp_path/name)


def test_a_later_file_that_is_not_utf8(tok, tmp_path):
    (tmp_path/'in').mkdir()
    (tmp_path/'in'/'0.txt').write_text('fine')
    (tmp_path/'in'/'1.txt').write_bytes('café'.encode('latin1'))
    with pytest.raises(ValueError, match="1.txt` cannot be read as text: after 0 rows: 'utf-8' codec"):
        tokenize(load_corpus(tmp_path/'in'), tok, tmp_path/'tokens')


def test_folders_that_hold_nothing_or_a_mixture(tmp_path):
    with pytest.raises(ValueError, match='holds no .txt'): load_corpus(tmp_path)
    (tmp_path/'a.txt').write_text('a')
    (tmp_path/'b.jsonl').write_text('{"text": "b"}\n')
    with pytest.raises(ValueError, match='mixes json and text files'): load_corpus(tmp_path)


def test_rows_without_text(tok, tmp_path):
    (tmp_path/'a.jsonl').write_text('{"text": "a", "n": 1}\n{"text": null}\n{"n": 2}\n{"text": "b"}\n')
    assert tokenize(load_corpus(tmp_path/'a.jsonl'), tok, tmp_path/'tokens').documents==2
    (tmp_path/'b.jsonl').write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(ValueError, match='row 2 of `.*b.jsonl` has int in the column `text`'): tokenize(load_corpus(tmp_path/'b.jsonl'), tok, tmp_path/'t')
    with pytest.raises(ValueError, match='row 3 of the corpus has list in the column `text`'): tokenize(['a', 'b', dict(text=[])], tok, tmp_path/'t')
    (tmp_path/'c.jsonl').write_text('{"text": "a"}\n[1, 2]\n')
    with pytest.raises(ValueError, match='c.jsonl` cannot be read as json: after 1 rows: list where an object is expected'): load_corpus(tmp_path/'c.jsonl')
    assert tokenize(['', 'a', '', 'b', ''], tok, tmp_path/'empties')==tokenize(['a', 'b'], tok, tmp_path/'tokens')
    for nothing in [], [''], [dict(text=None)]:
        with pytest.raises(ValueError, match='holds no text in the column `text`'): tokenize(nothing, tok, tmp_path/'t')


def test_too_few_tokens(tmp_path):
    tokens = write_tokens(tmp_path/'t', 100)
    assert Batches(tokens, 9, 11).n_windows==11                     # 99 tokens to predict: just enough
    with pytest.raises(ValueError, match=r'100 tokens, too few for one batch of 12 windows of 9 tokens \(109 are needed\)'): Batches(tokens, 9, 12)
    with pytest.raises(ValueError, match='11 windows of 9 tokens, fewer than the 12'): held_out(tokens, 9, 12)
    with pytest.raises(ValueError, match='too few'): held_out(tokens, 100)


# The Hub

class FakeHub(http.server.BaseHTTPRequestHandler):
    "A Hub that holds one data set, `me/corpus`, and nothing else; it may break connections off, or be down."
    protocol_version = 'HTTP/1.1'

    def answer(self):
        body = self.rfile.read(int(self.headers.get('content-length') or 0))
        url, base, hub = urlparse(self.path), '/api/datasets/me/corpus', self.server
        path, files = unquote(url.path), hub.files
        if path.startswith('/datasets/me/corpus/resolve/'):
            name = path.split('/', 6)[-1]
            head = {'X-Repo-Commit': 'a' * 40}
            return self.send_file(name, {**head, 'ETag': f'"{name}"'}) if name in files else self.send(b'', {**head, 'X-Error-Code': 'EntryNotFound'}, 404)
        file = lambda f: dict(type='file', path=f, size=len(files[f]), oid='b' * 40)
        if path.startswith(f'{base}/paths-info/'): return self.send([file(f) for f in parse_qs(body.decode()).get('paths', []) if f in files])
        if path.startswith(f'{base}/tree/'):
            under = path[len(base)+6:].partition('/')[2]
            inside = [f for f in files if f.startswith(f'{under}/' if under else '')]
            folders = {f[:f.index('/', len(under)+1)] for f in inside if '/' in f[len(under)+1:]}
            direct = [file(f) for f in inside if not any(f.startswith(d + '/') for d in folders)]
            return self.send([dict(type='directory', path=d, oid='c' * 40) for d in folders] + direct)
        if path.startswith(base): return self.send(dict(id='me/corpus', sha='a' * 40, tags=[], siblings=[dict(rfilename=f) for f in files]))
        self.send(b'', code=404)

    def send_file(self, name, head):
        data, hub, part = self.server.files[name], self.server, re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('range', ''))
        a, b = (int(part[1]), int(part[2] or len(data) - 1)) if part else (0, len(data) - 1)
        body = data[a:b + 1]
        if self.command=='GET' and name.startswith('data/'):
            hub.asked.append(name)
            if sum(hub.sent.values()) >= hub.down_after: return self.close()
            if hub.drops and len(body) > 100 and hub.asked.count(name)%2:
                hub.drops, hub.broken, cut = hub.drops - 1, hub.broken + 1, len(body)//2
            else: cut = len(body)
            hub.sent[name] = hub.sent.get(name, 0) + cut
        else: cut = len(body)
        self.send(body, {**head, 'Accept-Ranges': 'bytes', **({'Content-Range': f'bytes {a}-{b}/{len(data)}'} if part else {})}, 206 if part else 200, cut)

    def send(self, body, head=None, code=200, cut=None):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for k,v in {**(head or {}), 'Content-Length': len(body)}.items(): self.send_header(k, v)
        self.end_headers()
        if self.command!='HEAD': self.wfile.write(body[:cut])
        if cut is not None and cut < len(body): self.close()

    def close(self):
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = answer
    def log_message(self, *args): pass


@pytest.fixture
def hub():
    "A server on this machine: `files` by name; `drops` answers that are still to be cut in half; `down_after` so many bytes it answers no more."
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), FakeHub)
    server.files, server.drops, server.broken, server.down_after, server.asked, server.sent = {'README.md': b'---\nlicense: mit\n---\n'}, 0, 0, 10**12, [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


program = '''
import json, sys, time
from slm_begin.data import load_corpus, load_tokenizer
def attempt(f):
    start = time.perf_counter()
    try: out = f()
    except Exception as e: out = type(e).__name__, str(e)
    return out, time.perf_counter() - start
import datasets                                                     # not to be measured
if "model" in sys.argv: import transformers
print(json.dumps([attempt(f) for f in (
    lambda: [r["text"] for r in load_corpus("me/corpus")],
    lambda: [r["text"] for r in load_corpus("me/corpus", split="validation", streaming=False)],
    lambda: load_corpus("me/corpus", column="body"),
    lambda: load_corpus("me/corpus", split="calib"),
    lambda: load_corpus("me/nothing"),
    *["model" in sys.argv and (lambda: str(load_tokenizer("me/nothing")))]) if f]))
'''


def on_a_hub(tmp_path, *args, program=program, **env):
    keep = {k:v for k,v in os.environ.items() if not k.startswith('HF_')}
    env = {**keep, 'HF_HOME': str(tmp_path/'home'), 'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1', **env}
    r = subprocess.run([sys.executable, '-c', program, *args], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert not r.returncode, r.stderr
    return json.loads(r.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_data_set_of_the_hub_by_name(tmp_path, hub):
    for split in 'train', 'validation':
        pq.write_table(pa.table(dict(text=[f'{split} {d}' for d in docs])), tmp_path/'x.parquet')
        hub.files[f'data/{split}-00000-of-00001.parquet'] = (tmp_path/'x.parquet').read_bytes()
    (streamed, _), (whole, _), (column, _), (split, _), (nothing, _) = on_a_hub(tmp_path, HF_ENDPOINT=f'http://127.0.0.1:{hub.server_port}')
    assert streamed==[f'train {d}' for d in docs] and whole==[f'validation {d}' for d in docs]
    assert column==['ValueError', 'corpus `me/corpus` has no column `body`; it has text: name one with `column`']
    assert split[0]=='ValueError' and "['train', 'validation']" in split[1]
    assert nothing==['ConnectionError', no_network_hint('corpus', 'me/nothing')]


stream = '''
import json, sys, time
waits = []
time.sleep = waits.append                                           # between tries; left out here
from slm_begin import data
data.GROUP = 20_000
def attempt():
    try: return data.prepare("me/corpus", "train", data.load_tokenizer(), sys.argv[1], say=lambda s: None).manifest.text
    except Exception as e: return type(e).__name__, str(e)
print(json.dumps([attempt(), len(waits)]))
'''


def long_files(tmp_path, kind):
    "Six files of a hundred documents each, as a Hub holds them, and on disk."
    rng, files = random.Random(0), {}
    for i in range(6):
        texts = [' '.join(rng.choices(docs[0].split() + ['é', '🙂', '\n'], k=rng.randint(0, 300))) for _ in range(100)]
        if kind=='parquet': pq.write_table(pa.table(dict(text=texts, n=range(100))), tmp_path/'x', row_group_size=10)
        else: (tmp_path/'x').write_bytes(gzip.compress(''.join(json.dumps(dict(text=t)) + '\n' for t in texts).encode()))
        (tmp_path/f'{i}.{kind}').write_bytes((tmp_path/'x').read_bytes())
        files[f'data/train-0000{i}-of-00006.{kind}'] = (tmp_path/'x').read_bytes()
    (tmp_path/'x').unlink()
    return files


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['parquet', 'jsonl.gz'])
def test_a_hub_that_breaks_off_gives_the_same_tokens(tmp_path, tok, hub, kind):
    hub.files |= long_files(tmp_path, kind)
    want = tokenize(load_corpus(tmp_path), tok, tmp_path/'want').text
    hub.drops, env = 9, dict(HF_ENDPOINT=f'http://127.0.0.1:{hub.server_port}')
    assert on_a_hub(tmp_path, tmp_path/'got', program=stream, **env)[0]==want and hub.broken >= 3


@pytest.mark.slow
def test_a_hub_is_read_while_it_downloads(tmp_path, hub):
    for i in range(40): hub.files[f'data/train-000{i:02}-of-00040.jsonl'] = json.dumps(dict(text='word ' * 10_000)).encode() + b'\n'
    read = 'from slm_begin.data import load_corpus\nprint(len(next(iter(load_corpus("me/corpus")))["text"]))'
    assert on_a_hub(tmp_path, program=read, HF_ENDPOINT=f'http://127.0.0.1:{hub.server_port}')==50_000
    assert {*hub.sent}=={'data/train-00000-of-00040.jsonl'}


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['parquet', 'jsonl.gz'])
def test_a_hub_that_stays_down_loses_nothing(tmp_path, tok, hub, kind):
    hub.files |= long_files(tmp_path, kind)
    names = sorted(f for f in hub.files if f.startswith('data/'))
    want = tokenize(load_corpus(tmp_path), tok, tmp_path/'want').text
    hub.down_after, env = sum(len(hub.files[f]) for f in names[:5]), dict(HF_ENDPOINT=f'http://127.0.0.1:{hub.server_port}')
    (error, message), waits = on_a_hub(tmp_path, tmp_path/'got', program=stream, **env)
    assert error=='ConnectionError' and waits > 3 and re.search(r'the Hub stopped answering after [\d]+ rows of `me/corpus` .* it goes on from there', message)
    assert (tmp_path/'got.partial'/'state.json').exists() and not (tmp_path/'got').exists()
    hub.down_after, hub.sent = 10**12, {}
    assert on_a_hub(tmp_path, tmp_path/'got', program=stream, **env)[0]==want
    assert {*hub.sent} <= {names[0], *names[3:]}, "files that were done with were downloaded again (the first tells the columns)"


@pytest.mark.parametrize('env', [pytest.param(dict(HF_HUB_OFFLINE='1'), id='offline'),
                                 pytest.param(dict(HF_ENDPOINT='http://127.0.0.1:9'), id='unreachable', marks=pytest.mark.slow)])
def test_without_network_a_hub_name_fails_at_once_and_names_the_embedded_default(tmp_path, env):
    got = on_a_hub(tmp_path, *['model'] * ('HF_ENDPOINT' in env), **env)
    for (error, text), seconds in got:
        assert error=='ConnectionError' and 'ships in the package: `embedded`' in text and seconds < 10, (text, seconds)
    assert 'the corpus `me/corpus`' in got[0][0][1] and ('HF_HUB_OFFLINE' in env or 'the tokenizer `me/nothing`' in got[-1][0][1])


def test_what_is_not_a_hub_name_is_looked_for_on_disk_only(tmp_path):
    for name in 'a/b/c', './x.txt', 'notes.txt', str(tmp_path/'none'):
        with pytest.raises(FileNotFoundError, match='no such file or folder'): load_corpus(name)
    (tmp_path/'model').mkdir()
    with pytest.raises(ValueError, match='no tokenizer can be read from'): load_tokenizer(str(tmp_path/'model'))


# Tokens on disk

def test_pieces_lose_nothing(monkeypatch):
    rng = random.Random(0)
    for _ in range(300):
        size = rng.randint(2, 60)
        monkeypatch.setattr(data, 'PIECE', size)
        text = ''.join(rng.choices('ab\n\r é', [9, 9, rng.choice([0, 1, 5]), 1, 3, 1], k=rng.randint(0, 400)))
        blocks = [text[a:b] for a, b in itertools.pairwise([0, *sorted(rng.choices(range(len(text) + 1), k=5)), len(text)])]
        pieces, more = zip(*_pieces([text]), strict=True)
        assert list(_pieces(blocks))==list(zip(pieces, more, strict=True)) and [*more]==[True] * (len(pieces) - 1) + [False]
        assert ''.join(pieces)==text and max(map(len, pieces)) <= size and (len(text) <= size or min(map(len, pieces[:-1])) >= size//2)


def test_a_long_book_is_split_and_comes_back(tok, tmp_path):
    rng = random.Random(0)
    book = ''.join(rng.choice(['It was a dark night. ', 'Yes.\n', '\n', '“No!” said he. ']) for _ in range(30_000))
    man = tokenize([book, book[:1000]], tok, tmp_path/'t')
    assert len(list(_pieces([book]))) > 2 and man.characters==len(book) + 1000
    assert tok.decode(ids_of(tmp_path/'t').tolist())==book + tok.eos_token + book[:1000] + tok.eos_token


class WideTokenizer:
    "A vocabulary that needs more than 16 bits: each character is its code point + 70,000."
    eos_token_id, backend_tokenizer = 69_999, None
    def __len__(self): return 2_000_000
    def get_vocab(self): return dict(wide=1)
    def __call__(self, texts, **kw): return dict(input_ids=[[ord(c) + 70_000 for c in t] for t in texts])


def test_large_vocabularies_take_32_bits(tmp_path):
    man = tokenize(docs, WideTokenizer(), tmp_path/'t', shard_tokens=1000)
    ids = ids_of(tmp_path/'t')
    assert man.dtype=='uint32' and len(man.shards) > 3 and ids.max() > 2**16
    assert ''.join('|' if i==69_999 else chr(i - 70_000) for i in ids)==''.join(d + '|' for d in docs)


def test_max_tokens_is_exact_and_shards_add_up(tok, tmp_path):
    whole = tokenize(docs, tok, tmp_path/'whole')
    for n in 1, 17, whole.tokens - 1, whole.tokens, whole.tokens + 100:
        man = tokenize(docs, tok, tmp_path/'part', max_tokens=n, shard_tokens=7)
        assert man.tokens==sum(man.shards)==min(n, whole.tokens)
        assert (ids_of(tmp_path/'part')==ids_of(tmp_path/'whole')[:n]).all()


@pytest.mark.parametrize('seed', range(5))
def test_reading_across_shards(tmp_path, seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(60_000, size=rng.integers(1, 500))
    tokens = write_tokens(tmp_path/'t', ids=ids, shard_tokens=int(rng.integers(1, 50)))
    for _ in range(50):
        start = int(rng.integers(len(ids)))
        n = int(rng.integers(len(ids) - start + 1))
        assert (tokens.read(start, n)==ids[start:start+n]).all()


def grind(source, folder):
    "Tokenise in small groups, and slowly."
    data.GROUP, data.PIECE = 2000, 1000
    tokenize(load_corpus(source), load_tokenizer(), folder, shard_tokens=997, progress=lambda tokens, part: time.sleep(.01))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['txt', 'jsonl.gz', 'parquet'])
def test_kill_9_at_random_moments(processes, tok, tmp_path, kind, monkeypatch):
    "Ten times killed, and every file is what it would have been."
    rng, source, out = random.Random(kind), tmp_path/'in', tmp_path/'out'
    source.mkdir()
    text = next(iter(load_corpus(split='valid')))['text'][:1_000_000] * 6
    for i in range(3):
        texts = [text[i * 150_000 + j:i * 150_000 + j + rng.randint(1, 4000)] for j in range(0, 140_000, 2000)]
        if kind=='txt': (source/f'{i}.txt').write_text(''.join(texts))
        elif kind=='parquet': pq.write_table(pa.table(dict(text=texts)), source/f'{i}.parquet', row_group_size=20)
        else: (source/f'{i}.jsonl.gz').write_bytes(gzip.compress(''.join(json.dumps(dict(text=t)) + '\n' for t in texts).encode()))
    monkeypatch.setattr(data, 'PIECE', 1000)
    tokenize(load_corpus(source), tok, tmp_path/'want', shard_tokens=997)
    state, kills = tmp_path/'out.partial'/'state.json', 0
    size = lambda: sum(json.loads(state.read_text())['sizes']) if state.exists() else 0
    while not out.exists():
        goal = size() + rng.randint(500, 3000)
        p = processes(grind, source, out)
        with contextlib.suppress(FileNotFoundError):                # finished meanwhile
            while p.is_alive() and size() < goal: time.sleep(.001)
        time.sleep(rng.random() * .02)
        if p.is_alive() and kills < 10:
            os.kill(p.pid, signal.SIGKILL)
            kills += 1
        p.join()
        assert p.exitcode in (0, -signal.SIGKILL)
    assert kills==10 and not state.exists()
    files = {f.name for f in out.iterdir()}
    assert files=={f.name for f in (tmp_path/'want').iterdir()} and all((out/f).read_bytes()==(tmp_path/'want'/f).read_bytes() for f in files)


def small_groups(monkeypatch, source, n=40):
    "A corpus of `n` documents, each a group of its own."
    monkeypatch.setattr(data, 'GROUP', 10)
    source.write_text(''.join(json.dumps(dict(text=f'This is document {i} of some.')) + '\n' for i in range(n)))
    return lambda: load_corpus(source)


def test_stopped_and_gone_on_with(tok, tmp_path, monkeypatch):
    corpus, told, said = small_groups(monkeypatch, tmp_path/'a.jsonl'), [], []
    want = tokenize(corpus(), tok, tmp_path/'want', shard_tokens=7)
    for n in 1, 2, 5, 20:
        with pytest.raises(Stopped, match='stopped after .* tokens for `.*/out`; call again'):
            tokenize(corpus(), tok, tmp_path/'out', shard_tokens=7, progress=lambda *p: told.append(p), stop=lambda n=n: len(told)==n, say=said.append)
    assert tokenize(corpus(), tok, tmp_path/'out', shard_tokens=7, progress=lambda *p: told.append(p), say=said.append)==want
    assert len(said)==4 and all(re.fullmatch(r'going on after \d+ tokens that are there already', s) for s in said)
    assert len(told)==40, "a group was tokenised twice"
    tokens, parts = zip(*told, strict=True)
    assert [*tokens]==sorted({*tokens}) and tokens[-1]==want.tokens and [*parts]==sorted(parts) and parts[-1]==1


def test_killed_between_the_last_token_and_the_finished_folder(tok, tmp_path, monkeypatch):
    corpus, replace, told = small_groups(monkeypatch, tmp_path/'a.jsonl'), os.replace, []
    want = tokenize(corpus(), tok, tmp_path/'want')
    tokenize(['another text'], tok, tmp_path/'out')                  # is replaced
    def killed(a, b):
        if b==tmp_path/'out': raise SystemExit
        replace(a, b)
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(os, 'replace', killed)
        tokenize(corpus(), tok, tmp_path/'out')
    assert not (tmp_path/'out').exists()
    assert tokenize(corpus(), tok, tmp_path/'out', progress=lambda *p: told.append(p))==want and not told
    assert {f.name for f in tmp_path.iterdir()}=={'a.jsonl', 'want', 'out'} and (ids_of(tmp_path/'out')==ids_of(tmp_path/'want')).all()


def test_what_cannot_be_gone_on_with_is_begun_anew_and_said(tok, tmp_path, monkeypatch):
    corpus, said = small_groups(monkeypatch, tmp_path/'a.jsonl'), []
    def go(stop=None, **kw):
        said.clear()
        return tokenize(corpus(), tok, tmp_path/'out', stop=stop, say=said.append, **kw)
    def begin():
        with pytest.raises(Stopped): go(lambda: json.loads((tmp_path/'out.partial'/'state.json').read_text())['documents'] > 9, shard_tokens=50)
    begin()
    go(shard_tokens=51)
    assert 'another text or for another tokenizer, or the text was changed' in said[0]
    for harm, message in [(lambda f: f.unlink(), 'shard-00000.bin` is missing'), (lambda f: f.write_bytes(f.read_bytes()[:-1]), 'not what was written'),
                          (lambda f: f.write_bytes(b'x' + f.read_bytes()[1:]), 'not what was written')]:
        begin()
        harm(tmp_path/'out.partial'/'shard-00000.bin')
        got = go(shard_tokens=50)
        assert message in said[0] and got==tokenize(corpus(), tok, tmp_path/'want', shard_tokens=50)
    begin()
    small_groups(monkeypatch, tmp_path/'a.jsonl', 41)                # the source is changed
    assert go(shard_tokens=50).documents==41 and 'the text was changed since' in said[0]
    begin()
    (tmp_path/'out.partial'/'state.json').write_text('{"what')
    assert go(shard_tokens=50).documents==41


def on_a_small_disk(source, folder, room):
    "No file may grow beyond `room` bytes: what a full disk or a quota does."
    data.GROUP = 10
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try: tokenize(load_corpus(source), load_tokenizer(), folder)
    except OSError as e: (folder.parent/'error').write_text(str(e))


def test_a_full_disk_keeps_what_is_finished(processes, tok, tmp_path, monkeypatch):
    corpus = small_groups(monkeypatch, tmp_path/'a.jsonl', 200)
    want = tokenize(corpus(), tok, tmp_path/'want')
    p = processes(on_a_small_disk, tmp_path/'a.jsonl', tmp_path/'out', 2000)
    p.join()
    message = (tmp_path/'error').read_text()
    assert re.search(r'no room for more tokens in .*out.partial. \(File too large\): \d+ are there and kept; make room', message), message
    done, told = json.loads((tmp_path/'out.partial'/'state.json').read_text())['documents'], []
    assert done > 50 and tokenize(corpus(), tok, tmp_path/'out', progress=lambda *p: told.append(p))==want and len(told)==200 - done


def test_a_folder_that_cannot_be_written(tok, tmp_path):
    (tmp_path/'file').write_text('in the way')
    with pytest.raises(OSError, match=r'tokens cannot be written to `.*file/out.partial` \(Not a directory\): give a folder that can be written'):
        tokenize(docs, tok, tmp_path/'file'/'out')
    if os.geteuid():
        (tmp_path/'locked').mkdir(mode=0o500)
        with pytest.raises(OSError, match='Permission denied'): tokenize(docs, tok, tmp_path/'locked'/'out')


def test_an_error_in_the_middle_keeps_the_finished_folder(tok, tmp_path):
    before = tokenize(docs, tok, tmp_path/'t')
    def broken():
        yield dict(text='a')
        raise OSError('the disk is gone')
    with pytest.raises(ValueError, match='the disk is gone'): tokenize(broken(), tok, tmp_path/'t')
    assert Tokens(tmp_path/'t').manifest==before


def test_the_folder_may_end_with_a_slash_and_holds_nothing_else(tok, tmp_path):
    for _ in range(2): tokenize(docs, tok, f'{tmp_path}/t/')
    assert len(Tokens(f'{tmp_path}/t/')) > 0
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.tex').write_text('years of work')
    with pytest.raises(ValueError, match=r'holds other files \(thesis.tex\)'): tokenize(docs, tok, tmp_path/'mine')
    assert (tmp_path/'mine'/'thesis.tex').read_text()=='years of work'


def test_prepare_makes_anew_what_was_made_of_something_else(tok, tmp_path):
    for i,d in enumerate(docs[:2]): (tmp_path/f'{i}.txt').write_text(d)
    said = []
    def go(name, **kw):
        said.clear()
        return prepare(str(tmp_path/name), 'train', tok, tmp_path/'t', say=said.append, **kw).manifest
    first = go('0.txt')
    assert said and go('0.txt')==first and not said                 # found, not made again
    short = go('0.txt', max_tokens=5)
    assert short.tokens==5 and go('0.txt', max_tokens=5)==short and not said
    assert go('0.txt').tokens==first.tokens and said                # a shortened one does not stand for the whole
    large = go('0.txt', max_tokens=10**6)
    assert large.tokens==first.tokens and go('0.txt', max_tokens=10**6)==large and not said
    assert go('1.txt').text!=first.text and said                    # nor another corpus
    (tmp_path/'t'/'manifest.json').write_text('{"tok')
    assert go('1.txt') and said                                     # nor a damaged manifest


def test_tokenizer_hash_tells_tokenizers_apart(tok):
    other = load_tokenizer()
    assert tokenizer_hash(other)==tokenizer_hash(tok)
    other.add_tokens(['slm'])
    assert tokenizer_hash(other)!=tokenizer_hash(tok)!=tokenizer_hash(WideTokenizer())


def test_tokens_of_older_and_newer_versions(tok, tmp_path):
    tokens = write_tokens(tmp_path/'t', 100)
    path, values = tmp_path/'t'/'manifest.json', json.loads((tmp_path/'t'/'manifest.json').read_text())
    path.write_text(json.dumps(values | dict(version=1)))
    assert len(Tokens(tmp_path/'t'))==len(tokens)
    path.write_text(json.dumps(values | dict(version=99, colour='red')))
    with pytest.raises(ValueError, match='made by a newer version of slm_begin'): Tokens(tmp_path/'t')


def test_tokens_in_another_process_or_system(tmp_path, monkeypatch):
    tokens = write_tokens(tmp_path/'t', ids=np.arange(60_000), shard_tokens=25_000)
    pickled = pickle.dumps(tokens)                                  # holds the folder only
    assert len(pickled) < 1000 and (pickle.loads(pickled).read(0, 60_000)==np.arange(60_000)).all()
    count, opened = lambda: len(os.listdir('/dev/fd')), tokens.open
    before = count()
    del tokens
    assert count()==before - len(opened)==before - 3                # files are closed
    monkeypatch.delattr(os, 'pread')
    assert (Tokens(tmp_path/'t').read(24_000, 30_000)==np.arange(24_000, 54_000)).all()


def wait_for(source, folder, said):
    with open(said, 'a') as f: prepare(str(source), 'train', load_tokenizer(), folder, say=lambda s: None, main=False), f.write('found')


def test_one_process_makes_tokens_and_the_others_wait(processes, tok, tmp_path):
    (tmp_path/'a.txt').write_text('some words ' * 1000)
    (tmp_path/'b.txt').write_text('other words ' * 1000)
    prepare(str(tmp_path/'b.txt'), 'train', tok, tmp_path/'t', say=lambda s: None)             # tokens of another text are not waited for
    p = processes(wait_for, tmp_path/'a.txt', tmp_path/'t', tmp_path/'said')
    while not (tmp_path/'said').exists(): time.sleep(.02)
    time.sleep(.3)
    assert p.is_alive() and not (tmp_path/'said').read_text()
    prepare(str(tmp_path/'a.txt'), 'train', tok, tmp_path/'t', say=lambda s: None)
    p.join(300)
    assert p.exitcode==0 and (tmp_path/'said').read_text()=='found'
    with pytest.raises(Stopped, match='another process makes the tokens'): prepare('nothing', 'train', tok, tmp_path/'u', main=False, stop=lambda: True)


# Batches

@pytest.mark.parametrize('seed', range(12))
def test_every_token_once(tmp_path, seed):
    rng = random.Random(seed)
    seq_len, n = rng.randint(1, 40), rng.randint(300, 900)
    tokens = write_tokens(tmp_path/'t', ids=np.arange(n), shard_tokens=rng.randint(10, 400))
    windows = (n - 1)//seq_len
    batch, shards = rng.randint(1, min(windows, 24)), rng.choice([1, 2, 3])
    batches = Batches(tokens, seq_len, batch, seed=rng.randint(0, 99), shuffle=rng.random() < .8)
    cuts = [batch * i//shards for i in range(shards + 1)]
    rows = [r for step in range(3 * windows//batch + 1) for a,b in zip(cuts, cuts[1:], strict=False) if b > a for r in batches.rows(step, a, b).tolist()]
    assert all(r==list(range(r[0], r[0] + seq_len + 1)) for r in rows)          # whole windows, in the text's order
    for epoch in range(3):
        targets = sorted(t for r in rows[epoch * windows:(epoch + 1) * windows] for t in r[1:])
        assert targets==list(range(1, windows * seq_len + 1)), f"epoch {epoch}: {seq_len=} {n=} {batch=}"


def test_window_ids_name_the_windows(tmp_path):
    b = Batches(write_tokens(tmp_path/'t', 1000), 9, 20, seed=3)
    for step in 0, 4, 5, 6, 17:
        ids = b.window_ids(step, 3, 20)
        assert ids.dtype==np.int64 and (b.rows(step, 3, 20).numpy()==np.stack([b.window(i) for i in ids])).all()
    assert sorted(np.concatenate([b.window_ids(s, 0, 20) for s in range(6)])[:b.n_windows])==list(range(b.n_windows))


@pytest.mark.parametrize('attention', ['eager', 'sdpa'])
def test_with_positions_attention_stays_within_documents(attention):
    "Each document of a window gets the logits that it gets alone."
    eot, ids = 0, torch.randint(1, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    ids[0, [5, 6, 15]], ids[1, [0, 23]] = eot, eot
    model = tiny_model()
    model.set_attn_implementation(attention)
    positions = document_positions(ids, eot)
    with torch.no_grad():
        got = model(ids, position_ids=positions, use_cache=False).logits
        for row, p, logits in zip(ids, positions, got, strict=True):
            starts = [*(p==0).nonzero().flatten().tolist(), 24]
            for a, b in zip(starts, starts[1:], strict=False):
                assert torch.allclose(logits[a:b], model(row[None, a:b], use_cache=False).logits[0], atol=1e-5)


@pytest.mark.parametrize('seed', range(12))
def test_mixtures(tmp_path, seed):
    "Exact shares over any stretch, every window of a source once in its epoch, whoever reads which rows."
    rng = random.Random(seed)
    n, seq_len, batch = rng.randint(2, 5), rng.randint(1, 9), rng.randint(1, 12)
    cuts = sorted(rng.sample(range(1, 100), n - 1))
    weights = {f's{i}': (b - a)/100 for i, (a, b) in enumerate(itertools.pairwise([0, *cuts, 100]))}
    sources = {name: write_tokens(tmp_path/name, ids=1000 * i + np.arange(rng.randint(12 * seq_len + 1, 150))) for i, name in enumerate(weights)}
    b = Batches(Mixture(sources, weights), seq_len, batch, seed=seed)
    assert b.n_windows==sum(b.sizes) and b.starts==[sum(b.sizes[:i]) for i in range(n + 1)]
    steps = 1 + 4000//batch
    ids = np.concatenate([b.window_ids(s, 0, batch) for s in range(steps)])
    cut = rng.randint(0, batch)
    assert (b.rows(5, 0, batch).numpy()==np.stack([b.window(i) for i in ids[5 * batch:6 * batch]])).all()
    assert [*b.window_ids(5, 0, cut), *b.window_ids(5, cut, batch)]==[*ids[5 * batch:6 * batch]]
    whole = Batches(b.tokens, seq_len, 7, seed=seed)                # the batch size does not change the order
    assert [*np.concatenate([whole.window_ids(s, 0, 7) for s in range(100)])]==[*ids[:700]]
    for s, (name, w) in enumerate(weights.items()):
        mine = (b.starts[s] <= ids) & (ids < b.starts[s + 1])
        count = np.concatenate([[0], np.cumsum(mine)]) - w * np.arange(len(ids) + 1)
        assert np.ptp(count) < n + 1, f"{name}: off by {np.ptp(count):.2f} rows"
        drawn = ids[mine][:len(ids[mine])//b.sizes[s] * b.sizes[s]].reshape(-1, b.sizes[s])
        assert all(sorted(epoch)==list(range(b.starts[s], b.starts[s + 1])) for epoch in drawn)
        window = b.window(b.starts[s + 1] - 1)
        assert (window==sources[name].read((b.sizes[s] - 1) * seq_len, seq_len + 1)).all()


def test_mixtures_after_a_billion_rows(tmp_path):
    mix = Mixture({n: write_tokens(tmp_path/n, 100) for n in 'abc'}, dict(a=.1, b=.2, c=.7))
    counts = [[0, 0, 0] for _ in range(2)]
    for k, start in enumerate((0, 10**12)):
        for r in range(start, start + 1000): counts[k][mix.draw(r)[0]] += 1
    assert counts==[[100, 200, 700]] * 2 and max(n for s, n in (mix.draw(10**12 + i) for i in range(20)) if s==0) - 10**11 <= 3


def test_a_mixture_reads_as_one_text(tmp_path):
    parts = {n: write_tokens(tmp_path/n, ids=np.random.default_rng(i).integers(60_000, size=400 + i), shard_tokens=90) for i, n in enumerate('abc')}
    mix, ids = Mixture(parts, dict(a=.5, b=.25, c=.25)), np.concatenate([t.read(0, len(t)) for t in parts.values()])
    rng = np.random.default_rng(0)
    for _ in range(50):
        start, end = sorted(rng.integers(0, len(ids) + 1, 2))
        if start < end: assert (mix.read(start, end - start)==ids[start:end]).all()
    assert len(mix)==len(ids)==mix.manifest.tokens and overlap(parts['b'].read(100, 60)[None], mix, span=20)==[(0, 500), (0, 520), (0, 540)]
    assert held_out(mix, 50, 12).shape==(12, 51)


def test_the_key_of_a_mixture(tmp_path):
    parts = {n: write_tokens(tmp_path/n, 300, seed=i) for i, n in enumerate('ab')}
    key = lambda *w: Batches(Mixture(parts, dict(zip('ab', w, strict=True))), 9, 2).key
    assert key(.5, .5)==key(1/2, .5)!=key(.25, .75) and key(.1, .9)==key(.1, 1 - .1) and json.loads(json.dumps(key(.1, .9)))==key(.1, .9)
    assert key(.5, .5)['text']!=Batches(parts['a'], 9, 2).key['text'] and 'mixture' not in Batches(parts['a'], 9, 2).key


def test_bad_mixtures(tmp_path, tok):
    a, b = (write_tokens(tmp_path/n, 100) for n in 'ab')
    for weights, message in [(dict(a=.5, b=.4), 'sum to 0.9, not to 1: 0.5 \\* a, 0.4 \\* b'), (dict(a=1.5, b=-.5), 'weight of `b` is -0.5'),
                             (dict(a=1, b=0), 'weight of `b` is 0'),
                             (dict(a=1), '`weights` names a; the sources of the mixture are a, b'), (dict(a=float('nan'), b=1), 'weight of `a` is nan')]:
        with pytest.raises(ValueError, match=message): Mixture(dict(a=a, b=b), weights)
    other = tokenize(docs, WideTokenizer(), tmp_path/'wide') and Tokens(tmp_path/'wide')
    with pytest.raises(ValueError, match='a, wide.* different tokenizers'): Mixture(dict(a=a, wide=other), dict(a=.5, wide=.5))
    with pytest.raises(ValueError, match=r'`b` of the mixture holds 100 tokens, too few for one window of 100 tokens \(101'):
        Batches(Mixture(dict(a=write_tokens(tmp_path/'c', 300), b=b), dict(a=.5, b=.5)), 100, 1)
    with pytest.raises(FileNotFoundError, match='no such file'):
        prepare_text(f'0.5*embedded + 0.5*{tmp_path}/none.txt', 'valid', tok, tmp_path/'m', say=lambda s: None)


def test_parse_mixture(tmp_path, monkeypatch):
    assert parse_mixture(' .5*a  +  0.25 * b/c:train + .25*d*e ')=={'a': .5, 'b/c:train': .25, 'd*e': .25}
    for name in 'embedded', 'me/corpus:train', '/data/a+b', 'c++', 'c + +': assert parse_mixture(name)=={name: 1.}
    for text, message in [('.5*a + .4*b', 'sum to 0.9'), ('.5*a + b', '`b` in the mixture .* as `weight\\*name`'), ('half*a + .5*b', '`half\\*a`'),
                          ('.5* + .5*b', r'`.5\*`'), ('.5*a + .5*a', '`a` stands twice'), ('-1*a + 2*b', 'weight of `a` is -1'),
                          ('1e999*a', 'sum to inf'), ('.5*a + ', 'a')]:
        with pytest.raises(ValueError, match=message): parse_mixture(text)
    monkeypatch.chdir(tmp_path)
    (tmp_path/'.5*a + .4*b').mkdir()
    assert parse_mixture('.5*a + .4*b')=={'.5*a + .4*b': 1.}         # a name that exists is a name


def test_weights_can_be_changed_without_tokenising_again(tok, tmp_path):
    for name in 'ab': (tmp_path/f'{name}.txt').write_text(f'{name} book. ' * 500)
    said = []
    go = lambda text, **kw: prepare_text(text.replace('@', f'{tmp_path}/'), 'train', tok, tmp_path/'out', say=said.append, **kw)
    first = go('.5*@a.txt + .5*@b.txt')
    assert len(said)==2
    second = go('.1*@b.txt + .9*@a.txt')
    assert len(said)==2 and [*second.sources]==[*first.sources][::-1] and [*map(float, second.weights.values())]==[.1, .9]
    assert len(go('.5*@a.txt + .5*@b.txt', max_tokens=50))==100


# What ships in the package

@pytest.fixture(scope='module')
def shipped():
    "The rows of each split of the embedded corpus."
    return {s: list(load_corpus(split=s)) for s in SPLITS + OTHERS}


def test_splits_do_not_leak(shipped):
    "No long line of text is in two splits of the embedded corpus."
    lines = {s: {x for row in rows for x in row['text'].split('\n') if len(x) > 60} for s, rows in shipped.items()}
    for a, b in itertools.combinations(lines, 2):
        both = lines[a] & lines[b]
        assert len(both) <= 5, f"{len(both)} lines are in {a} and {b}, such as {sorted(both)[:3]}"


def test_what_results_are_measured_on_is_nowhere_else(tok, tmp_path):
    "Word for word: no 100 tokens in a row of a text that is measured on stand in another one (the training split is compared in the chapter)."
    tokens = {s: prepare('embedded', s, tok, tmp_path/s, say=lambda line: None) for s in ('calib', 'valid', *OTHERS)}
    assert {s: len(t) > 40_000 for s, t in tokens.items()}==dict.fromkeys(tokens, True)
    for a, b in itertools.permutations(tokens, 2): assert overlap(tokens[a].read(0, len(tokens[a]))[None], tokens[b])==[], f"{a} in {b}"


def test_works_are_listed(shipped):
    works = json.loads((data.assets()/'novels-mini'/'works.json').read_text(encoding='utf-8'))
    facts = ['id', 'title', 'author', 'year', 'source', 'licence']
    assert [list(w) for w in works]==[[*facts, 'split', 'characters']] * len(works)
    for split, rows in shipped.items():
        assert [{**{k: row[k] for k in facts}, 'split': split, 'characters': len(row['text'])} for row in rows]==[w for w in works if w['split']==split]
        assert list(rows[0])==[*facts, 'text'] and all(row['licence'] and row['source'] for row in rows)
    assert {row['id'] for row in shipped['test']}=={row['id'] for row in shipped['valid']}
    assert 'PYTHON SOFTWARE FOUNDATION LICENSE' in (data.assets()/'novels-mini'/'PSF-LICENSE.txt').read_text(encoding='utf-8')


def test_a_role_that_is_none(tok, tmp_path):
    for call in lambda: load_corpus(split='tests'), lambda: prepare_text('embedded', 'tests', tok, tmp_path):
        with pytest.raises(ValueError, match='split `tests` of the embedded corpus: choose one of train, calib, valid, test, bible, manual'): call()
    assert data.text_source('embedded', 'bible')==('embedded', 'bible') and data.text_source('novels.txt', 'test')==('novels.txt', 'train')


def test_how_the_texts_were_cut():
    "The test excerpt of a novel begins a paragraph after the validation excerpt and ends before the part that the tasks are made from."
    spec = importlib.util.spec_from_file_location('make_assets', Path(__file__).parent.parent/'tools'/'make_assets.py')
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    for n, step in itertools.product((2000, 4000), (70, 400, 3000)):
        text = ''.join(f'This is sentence {i:05}.' + ('\n' if i%(step//25)==0 else ' ') for i in range(n*4))
        valid, test = make.excerpt(text, make.VALID), make.after_valid(text)
        at, end = text.index(test), text.index(valid) + len(valid)
        assert text[at - 1]=='\n' and 20 < at - end <= 2*step + 50 and at + len(test) < make.TASKS_FROM * len(text)
        assert make.TEST - step - 50 < len(test) <= make.TEST and test.endswith('.')
    with pytest.raises(AssertionError): make.after_valid(text[:150_000])          # too short a novel: the excerpt would run into the tasks
    line = 'A line of prose that is as long as those of the manual are,'
    page = f'Title\n*****\n\n{line}\n{line}\nand its end.\n\n   def f(x):\n       return x\n\n* {line}\n  an item.\n\n-[ Footnotes ]-\n\n[1] Gone.'
    assert make.plain(page)==f'Title\n\n{line} {line} and its end.\n\n   def f(x):\n       return x\n\n* {line} an item.'


def test_lines_of_a_log_that_was_cut(tmp_path):
    log = tmp_path/'log.jsonl'
    whole = ''.join(json.dumps(dict(step=i, text='é\u2028')) + '\n' for i in range(3))
    for n in range(len(whole) + 1):
        log.write_text(whole[:n])
        assert [o['step'] for o in read_lines(log)]==list(range((whole[:n] + '\n').count('}\n')))
        before = read_lines(log)
        append_line(log, dict(step=-1))                             # a cut line stays behind, and nothing else is lost
        assert read_lines(log)==[*before, dict(step=-1)]


def test_overlap_finds_every_long_run_at_any_place(tmp_path):
    "Against a search by hand: runs of 2 * span - 1 tokens and more are found, wherever they begin; what is not there is not found."
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50, 30_000)
    tokens = write_tokens(tmp_path/'t', ids=ids)
    for _ in range(40):
        window, start, at, n = rng.integers(50, 99, 200), int(rng.integers(0, 29_900)), int(rng.integers(0, 100)), int(rng.integers(19, 100))
        window[at:at + n] = ids[start:start + n]
        found = overlap(window[None], tokens, span=10)
        assert found and all(w==0 and start <= p < start + n for w, p in found)
    assert overlap(rng.integers(50, 99, (5, 200)), tokens, span=10)==[] and overlap(ids[None, :9], tokens, span=10)==[]


def test_overlap_of_whole_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(data, '_CHUNK', 1000)
    ids = np.random.default_rng(0).integers(0, 60_000, 20_000)
    ids[15_000:15_100] = ids[300:400]                               # stands twice: the first place counts
    a = write_tokens(tmp_path/'a', ids=ids)
    b = write_tokens(tmp_path/'b', ids=np.concatenate([ids[15_000:], ids[:100], ids[7:9]]))
    whole = overlap(b.read(0, len(b))[None], a, span=50)
    assert whole==[(0, o) for o in (0, 50, 300, 350, *range(15_100, 20_000, 50))]


def test_overlap_across_chunks(tmp_path, monkeypatch):
    "A run that lies on the border of two chunks is found once."
    monkeypatch.setattr(data, '_CHUNK', 1000)
    ids = np.random.default_rng(0).integers(0, 60_000, 5_000)
    tokens = write_tokens(tmp_path/'t', ids=ids)
    for start in (0, 985, 991, 999, 1000, 1001, 4990): assert overlap(ids[None, start:start + 10], tokens, span=10)==[(0, start)]


@pytest.mark.slow
def test_files_of_a_data_set_of_the_hub(tmp_path, hub):
    "Parts that do not overlap, told apart by their files, as the recipes for large models name them."
    for name in ('sample/000_00000', 'sample/000_00001', 'sample/001_00000', 'sample/001_00002', 'other/000_00001'):
        pq.write_table(pa.table(dict(text=[f'{name} {d}' for d in docs])), tmp_path/'x.parquet')
        hub.files[f'{name}.parquet'] = (tmp_path/'x.parquet').read_bytes()
    code = '''
import json
from slm_begin.data import load_corpus, load_tokenizer, parse_mixture, prepare_text
at = "hf://datasets/me/corpus/sample/"
read = lambda name: sorted({r["text"].split()[0] for r in load_corpus(name)})
def error(name):
    try: load_corpus(name)
    except Exception as e: return type(e).__name__, str(e)
man = prepare_text(f"0.5*{at}000_*.parquet + 0.5*{at}001_*.parquet", "train", load_tokenizer(), "tokens", say=lambda s: None)
print(json.dumps([read(at + "0??_0000[1-9].parquet"), read(at + "000_00000.parquet"), len(man.sources), error(at + "none.parquet"), error(at + "0??")]))
'''
    train, calib, sources, none, suffix = on_a_hub(tmp_path, program=code, HF_ENDPOINT=f'http://127.0.0.1:{hub.server_port}')
    assert train==['sample/000_00001', 'sample/001_00002'] and calib==['sample/000_00000'] and sources==2
    assert none[0]=='ConnectionError'
    assert suffix==['ValueError', 'corpus `hf://datasets/me/corpus/sample/0??` names files; they must end in .txt, .md, .jsonl, .json, .parquet']
