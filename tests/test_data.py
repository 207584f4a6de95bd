"data: where text may come from and what may be wrong with it, tokens on disk after a kill, and the law that an epoch sees every token once."
import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from urllib.parse import parse_qs, unquote, urlparse

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_tokens

from slm_begin.data import (
    Batches,
    Tokens,
    _pieces,
    append_line,
    held_out,
    load_corpus,
    load_tokenizer,
    no_network_hint,
    overlap,
    prepare,
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
    ('latin.txt', 'café'.encode('latin1'), "`.*latin.txt` cannot be read as text: 'utf-8' codec"),
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
    with pytest.raises(ValueError, match="cannot be read to its end: 'utf-8' codec"): tokenize(load_corpus(tmp_path/'in'), tok, tmp_path/'tokens')


def test_folders_that_hold_nothing_or_a_mixture(tmp_path):
    with pytest.raises(ValueError, match='holds no .txt'): load_corpus(tmp_path)
    (tmp_path/'a.txt').write_text('a')
    (tmp_path/'b.jsonl').write_text('{"text": "b"}\n')
    with pytest.raises(ValueError, match='mixes json and text files'): load_corpus(tmp_path)


def test_rows_without_text(tok, tmp_path):
    (tmp_path/'a.jsonl').write_text('{"text": "a", "n": 1}\n{"text": null}\n{"n": 2}\n{"text": "b"}\n')
    assert tokenize(load_corpus(tmp_path/'a.jsonl'), tok, tmp_path/'tokens').documents==2
    (tmp_path/'b.jsonl').write_text('{"text": 1}\n')
    with pytest.raises(ValueError, match='row 0 of the corpus has int in the column `text`'): tokenize(load_corpus(tmp_path/'b.jsonl'), tok, tmp_path/'t')
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
    "A Hub that holds one data set, `me/corpus`, and nothing else."
    protocol_version, commit, files = 'HTTP/1.1', 'a' * 40, {}

    def answer(self):
        body = self.rfile.read(int(self.headers.get('content-length') or 0))
        url, base = urlparse(self.path), '/api/datasets/me/corpus'
        path, files = unquote(url.path), self.files
        if path.startswith('/datasets/me/corpus/resolve/'):
            name = path.split('/', 6)[-1]
            head = {'X-Repo-Commit': self.commit}
            return self.send(files[name], {**head, 'ETag': f'"{name}"'}) if name in files else self.send(b'', {**head, 'X-Error-Code': 'EntryNotFound'}, 404)
        file = lambda f: dict(type='file', path=f, size=len(files[f]), oid='b' * 40)
        if path.startswith(f'{base}/paths-info/'): return self.send([file(f) for f in parse_qs(body.decode()).get('paths', []) if f in files])
        if path.startswith(f'{base}/tree/'):
            under = path[len(base)+6:].partition('/')[2]
            inside = [f for f in files if f.startswith(f'{under}/' if under else '')]
            folders = {f[:f.index('/', len(under)+1)] for f in inside if '/' in f[len(under)+1:]}
            direct = [file(f) for f in inside if not any(f.startswith(d + '/') for d in folders)]
            return self.send([dict(type='directory', path=d, oid='c' * 40) for d in folders] + direct)
        if path.startswith(base): return self.send(dict(id='me/corpus', sha=self.commit, tags=[], siblings=[dict(rfilename=f) for f in files]))
        self.send(b'', code=404)

    def send(self, body, head=None, code=200):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for k,v in {**(head or {}), 'Content-Length': len(body)}.items(): self.send_header(k, v)
        self.end_headers()
        if self.command!='HEAD': self.wfile.write(body)

    do_GET = do_HEAD = do_POST = answer
    def log_message(self, *args): pass


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


def on_a_hub(tmp_path, *args, **env):
    keep = {k:v for k,v in os.environ.items() if not k.startswith('HF_')}
    env = {**keep, 'HF_HOME': str(tmp_path/'home'), 'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1', **env}
    r = subprocess.run([sys.executable, '-c', program, *args], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert not r.returncode, r.stderr
    return json.loads(r.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_data_set_of_the_hub_by_name(tmp_path):
    for split in 'train', 'validation':
        pq.write_table(pa.table(dict(text=[f'{split} {d}' for d in docs])), tmp_path/'x.parquet')
        FakeHub.files[f'data/{split}-00000-of-00001.parquet'] = (tmp_path/'x.parquet').read_bytes()
    FakeHub.files['README.md'] = b'---\nlicense: mit\n---\n'
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (streamed, _), (whole, _), (column, _), (split, _), (nothing, _) = on_a_hub(tmp_path, HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}')
    server.shutdown()
    assert streamed==[f'train {d}' for d in docs] and whole==[f'validation {d}' for d in docs]
    assert column==['ValueError', 'corpus `me/corpus` has no column `body`; it has text: name one with `column`']
    assert split[0]=='ValueError' and "['train', 'validation']" in split[1]
    assert nothing==['ConnectionError', no_network_hint('corpus', 'me/nothing')]


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

def test_pieces_lose_nothing():
    rng = random.Random(0)
    for _ in range(300):
        text = ''.join(rng.choices('ab\n\r é', [9, 9, rng.choice([0, 1, 5]), 1, 3, 1], k=rng.randint(0, 400)))
        size = rng.randint(2, 60)
        pieces = _pieces(text, size)
        assert ''.join(pieces)==text and max(map(len, pieces)) <= size and (len(text) <= size or min(map(len, pieces[:-1])) >= size//2)


def test_a_long_book_is_split_and_comes_back(tok, tmp_path):
    rng = random.Random(0)
    book = ''.join(rng.choice(['It was a dark night. ', 'Yes.\n', '\n', '“No!” said he. ']) for _ in range(30_000))
    man = tokenize([book, book[:1000]], tok, tmp_path/'t')
    assert len(_pieces(book)) > 2 and man.characters==len(book) + 1000
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


def endless(folder):
    def rows():
        for i in range(10**9):
            if i==9: (folder.parent/'begun').touch()                # the first group of documents is on disk
            if i > 9: time.sleep(.01)
            yield dict(text='Some words. ' * 50_000)
    tokenize(rows(), load_tokenizer(), folder)


def test_killed_tokenisation_leaves_no_finished_folder(processes, tok, tmp_path):
    p = processes(endless, tmp_path/'tokens')
    while not (tmp_path/'begun').exists() and p.is_alive(): time.sleep(.02)
    os.kill(p.pid, signal.SIGKILL)
    p.join()
    assert p.exitcode==-signal.SIGKILL and [f.name for f in tmp_path.iterdir() if f.is_dir()]==['tokens.partial']
    with pytest.raises(FileNotFoundError, match='no finished tokens'): Tokens(tmp_path/'tokens')
    (tmp_path/'a.txt').write_text('now it ends')
    assert prepare(str(tmp_path/'a.txt'), 'train', tok, tmp_path/'tokens', say=lambda s: None).manifest.documents==1
    assert not (tmp_path/'tokens.partial').exists()


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


def test_splits_do_not_leak():
    "No long line of text is in two splits of the embedded corpus."
    lines = {s: {x for row in load_corpus(split=s) for x in row['text'].split('\n') if len(x) > 60} for s in ('train', 'calib', 'valid')}
    for a,b in ('train', 'calib'), ('train', 'valid'), ('calib', 'valid'):
        both = lines[a] & lines[b]
        assert len(both) <= 5, f"{len(both)} lines are in {a} and {b}, such as {sorted(both)[:3]}"


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


def test_overlap_across_chunks(tmp_path, monkeypatch):
    "A run that lies on the border of two chunks is found once."
    from slm_begin import data
    monkeypatch.setattr(data, '_CHUNK', 1000)
    ids = np.random.default_rng(0).integers(0, 60_000, 5_000)
    tokens = write_tokens(tmp_path/'t', ids=ids)
    for start in (0, 985, 991, 999, 1000, 1001, 4990): assert overlap(ids[None, start:start + 10], tokens, span=10)==[(0, start)]
