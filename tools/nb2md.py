"""Turn notebooks that nbdev has processed into Markdown, without Quarto.

`python tools/nb2md.py readme` writes README.md from `readme_nb`, and the pictures it shows to `nbs/images/readme_*`; add `--check` to fail when they are stale.
`python tools/nb2md.py site` writes one page per notebook, and the navigation of `nbs/sidebar.yml`, to `_site_src/` for `mkdocs build --strict`.
"""
import argparse
import html
import json
import os
import posixpath
import re
import shutil
import sys
from base64 import b64decode
from pathlib import Path

import yaml
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.processors import FilterDefaults
from nbdev.serve import proc_nbs
from nbdev.serve_drv import main as proc_nb

pictures = {'image/png':'png', 'image/jpeg':'jpg', 'image/gif':'gif', 'image/svg+xml':'svg'}
_quarto_opt = re.compile(r'^#\|.*\n?', re.M)
_anchor = re.compile(r'^(#+) +(.+?) *$', re.M)
_div = re.compile(r'^:{3,} *(?:\{(.*?)\})? *$')
_link = re.compile(r'(\]\(|\b(?:src|href)=")([^)\s"]+)')
_attrs = re.compile(r'(\]\([^)\s]+(?: "[^"]*")?\))\{[^}\n]*\}')
_fences = re.compile(r'(^(`{3,}).*?^\2`*$)', re.M|re.S)
_spans = re.compile(r'((`+)(?!`).+?(?<!`)\2(?!`))', re.S)
_math = re.compile(r'\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?=\S)(?P<inline>[^$\n]+?)(?<=\S)\$(?![\w$])', re.S)


def text(o): return o if isinstance(o, str) else ''.join(o)

def outside(rx, f, s):
    "Apply `f` to the parts of `s` that `rx`, whose first group is the whole match and which has two groups, does not match."
    return ''.join(p if i%3==1 else f(p) if i%3==0 else '' for i,p in enumerate(rx.split(s)))

def prose(f, s): return outside(_fences, f, s)

class Media:
    "The pictures of one page: `put` remembers one and returns its link, `write` writes them all."
    def __init__(self, folder, stem, link): self.folder,self.stem,self.link,self.files = folder,stem,link,{}

    def put(self, mime, data):
        name = f'{self.stem}_{len(self.files)+1}.{pictures[mime]}'
        self.files[name] = data.encode() if mime=='image/svg+xml' else b64decode(data)
        return posixpath.join(self.link, name)

    def stale(self):
        "Names that are missing, differ or are left over on disk."
        old = {o.name: o.read_bytes() for o in self.folder.glob(f'{self.stem}_*')} if self.folder.exists() else {}
        return sorted(k for k in old.keys()|self.files.keys() if old.get(k)!=self.files.get(k))

    def write(self):
        for k in self.stale():
            if k not in self.files: (self.folder/k).unlink(); continue
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder/k).write_bytes(self.files[k])


def front_matter(cell):
    "The title and the description nbdev put in the first, raw, cell."
    return yaml.safe_load(text(cell['source']).strip().strip('-')) or {}

def callouts(md, flavour):
    "Quarto `:::` blocks: a callout becomes a quote or an admonition, any other block loses its fence."
    out, kind = [], None
    for l in md.split('\n'):
        m = _div.match(l)
        if m is None: out.append(l if not kind else ('> ' if flavour=='gfm' else '    ') + l)
        elif m[1] and 'callout-' in m[1]:
            kind = re.search(r'callout-(\w+)', m[1])[1]
            out.append(f'> **{kind.title()}**\n>' if flavour=='gfm' else f'!!! {kind}\n')
        else: kind = None
    return '\n'.join(out)

def attached(cell, md, media):
    "`md` with the pictures pasted into `cell` written as files."
    for name,d in cell.get('attachments', {}).items():
        if f'attachment:{name}' not in md: continue
        mime = next((k for k in pictures if k in d), None)
        if mime is None: sys.exit(f"attachment `{name}` has no form that a page can show: {list(d)}; use one of {list(pictures)}")
        md = md.replace(f'attachment:{name}', media.put(mime, text(d[mime])))
    return md

def fence(s, lang=''):
    ticks = max([3, *(len(o)+1 for o in re.findall(r'`{3,}', s))])*'`'
    return f'{ticks}{lang}\n{s.rstrip()}\n{ticks}'

def stream(s):
    "What a terminal would show in the end: no colours, and of a progress line only its last state."
    s = re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', s).replace('\r\n', '\n')
    return '\n'.join(next((o for o in reversed(l.split('\r')) if o.strip()), '') for l in s.split('\n'))

def alt(d):
    "The alternative text of a picture: what it says of itself in words, as the figures of `plots` do."
    said = ' '.join(text(d.get('text/plain', '')).split())
    if not said or said.startswith('<'): return 'output of the code above'
    return re.sub(r'[\[\]*_`\\]', lambda c: f'&#{ord(c[0])};', html.escape(said))

def output(o, flavour, media):
    "Markdown for one output: the richest form that `flavour` can show."
    if o['output_type']=='stream': return fence(stream(text(o['text']))) if text(o['text']).strip() else ''
    if o['output_type']=='error': return fence(stream('\n'.join(o['traceback'])))
    d = o['data']
    if 'text/markdown' in d: return re.sub(r'^---\n', '', text(d['text/markdown']))
    if flavour=='site' and 'text/html' in d: return f'<div class="nb-output">\n{text(d["text/html"])}\n</div>'
    for k in pictures:
        if k in d: return f'![{alt(d)}]({media.put(k, text(d[k]))})'
    if 'application/vnd.jupyter.widget-view+json' in d: return '*An interactive control stands here: open the notebook to use it.*'
    return fence(stream(text(d['text/plain']))) if 'text/plain' in d else ''

def code(s, opts):
    res = fence(_quarto_opt.sub('', s), 'python')
    if opts.get('code-fold') not in ('true', 'show'): return res
    name = html.escape(opts.get('code-summary', 'Code').strip('"\''))
    return f'<details{" open" if opts["code-fold"]=="show" else ""} markdown="1">\n<summary>{name}</summary>\n\n{res}\n\n</details>'

def mathml(md):
    "TeX between dollars as MathML, which browsers show without a script."
    from latex2mathml.converter import convert
    def one(m):
        res = convert((m['block'] or m['inline']).strip(), display='block' if m['block'] else 'inline')
        return f'\n\n<div class="math">{res}</div>\n\n' if m['block'] else re.sub(r'[*_`\[\]|\\]', lambda c: f'&#{ord(c[0])};', res)
    return prose(lambda s: outside(_spans, lambda t: _math.sub(one, t), s), md)

def nb2md(path, flavour, media):
    "Markdown for the processed notebook at `path`."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    fm = front_matter(cells[0]) if cells[0]['cell_type']=='raw' else {}
    res = [f"# {fm.get('title', path.stem)}"] + ([f"> {fm['description']}"] if fm.get('description') else [])
    for c in cells:
        s = text(c['source']).strip()
        if c['cell_type']=='markdown' and not s.startswith('<!--'):
            s = callouts(attached(c, s, media), flavour)
            res.append(mathml(s) if flavour=='site' else s)
        if c['cell_type']!='code': continue
        opts = dict(re.findall(r'^#\| *([\w-]+): *(.*)$', s, re.M))
        if opts.get('include')=='false': continue
        if opts.get('echo')!='false' and s: res.append(code(s, opts))
        if opts.get('output')!='false': res += [output(o, flavour, media) for o in c['outputs']]
    return '\n\n'.join(o.strip('\n') for o in res if o.strip()) + '\n'


def page(path):
    "Name of the page nbdev links to: the notebook's name without its number, in lower case."
    return path.with_name(re.sub(r'^\d+[a-zA-Z0-9]*_', '', path.name.lower())).with_suffix('.md')

def split_url(url):
    "The path and the `#anchor` of a link inside the project; `(None, '')` for any other link."
    if re.match(r'[a-z][\w+.-]*:|//|#|/', url): return None,''
    p,_,a = url.partition('#')
    return p, a and f'#{a}'

def relink(md, here, base, repo, notebooks):
    "Links of the page at `here`, a path below `nbs/`: nbdev's absolute ones become relative, notebooks become pages, files outside `nbs/` go to `repo`."
    md = prose(lambda s: re.sub(re.escape(base) + r'/([\w./-]+)\.html', lambda m: posixpath.relpath(m[1] + '.md', here.parent.as_posix()), s), md)
    def fix(m):
        p,a = split_url(m[2])
        if p is None: return m[0]
        full = posixpath.normpath(posixpath.join(here.parent.as_posix(), p))
        if full.startswith('../'): return f'{m[1]}{repo}/{full[3:]}{a}'
        return m[1] + (page(Path(p)).as_posix() if Path(full) in notebooks else p) + a
    return prose(lambda s: _link.sub(fix, s), md)

def anchors(md):
    "Give each heading that names a method the anchor nbdev links to."
    fix = lambda m: f"{m[0]} {{#{m[2].lower()}}}" if re.fullmatch(r'\w+(\.\w+)+', m[2]) else m[0]
    return prose(lambda s: _anchor.sub(fix, s), md)


def readme_md(cfg, proc, media):
    "README.md's text: links are relative to the repository, and lead to the notebooks instead of to a site."
    nbs, base = Path(cfg.nbs_path).name, cfg.doc_host + cfg.doc_baseurl
    pages = {page(o).with_suffix('').as_posix(): o.as_posix() for o in notebooks(cfg)}
    def fix(m):
        url = m[2]
        if url.startswith(base + '/') and '.html' in url: url = pages.get(url[len(base)+1:].partition('.html')[0], url)
        p,a = split_url(url)
        return m[1] + (url if p is None else posixpath.normpath(posixpath.join(nbs, p)) + a)
    md = nb2md(proc/cfg.readme_nb, 'gfm', media)
    return prose(lambda s: _link.sub(fix, _attrs.sub(r'\1', s)).replace(' markdown="1">', '>'), md)

def notebooks(cfg):
    nbs = Path(cfg.nbs_path).resolve()
    return sorted(o.resolve().relative_to(nbs) for o in nbglob(as_path=True))

def readme(cfg, check):
    src, proc = Path(cfg.nbs_path)/cfg.readme_nb, cfg.config_path/'_proc'
    if not src.exists(): sys.exit(f"there is no {os.path.relpath(src)}: `readme_nb` in settings.ini names the notebook that becomes README.md")
    proc.mkdir(exist_ok=True)
    proc_nb((src, proc/cfg.readme_nb, FilterDefaults))
    dest, media = cfg.config_path/'README.md', Media(Path(cfg.nbs_path)/'images', 'readme', 'images')
    new = readme_md(cfg, proc, media)
    if not check: media.write(); return dest.write_text(new, encoding='utf-8')
    stale = [] if dest.exists() and dest.read_text(encoding='utf-8')==new else ['README.md']
    stale += [f'nbs/images/{o}' for o in media.stale()]
    if stale: sys.exit(f"{', '.join(stale)}: out of date with nbs/{cfg.readme_nb}. Run `make readme` and commit the result.")


def nav(contents, indent='  '):
    "mkdocs navigation from the `contents` of Quarto's sidebar."
    for o in contents:
        if isinstance(o, str): yield f'{indent}- {page(Path(o)).as_posix()}\n'
        else: yield f"{indent}- {json.dumps(o['section'])}:\n"; yield from nav(o['contents'], indent + '    ')

def site(cfg):
    nbs, dest, base = Path(cfg.nbs_path), cfg.config_path/'_site_src', cfg.doc_host + cfg.doc_baseurl
    repo, found, proc = f'{cfg.git_url}/blob/{cfg.branch}', notebooks(cfg), proc_nbs(n_workers=0, force=True)
    shutil.rmtree(dest, ignore_errors=True)
    for rel in found:
        out = dest/'pages'/page(rel)
        out.parent.mkdir(parents=True, exist_ok=True)
        media = Media(out.parent/f'{out.stem}_files', 'output', f'{out.stem}_files')
        md = relink(nb2md(proc/rel, 'site', media), rel, base, repo, set(found))
        out.write_text(anchors(md), encoding='utf-8')
        media.write()
    for f in nbs.rglob('*'):
        if f.suffix.lower() in ('.png', '.jpg', '.jpeg', '.gif', '.svg', '.webp', '.css') and not any(o[0] in '._' for o in f.relative_to(nbs).parts):
            to = dest/'pages'/f.relative_to(nbs)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(f, to)
    contents = yaml.safe_load((nbs/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    (dest/'mkdocs.yml').write_text(mkdocs_yml.format(title=cfg.title, url=cfg.git_url, nav=''.join(nav(contents))), encoding='utf-8')

mkdocs_yml = """site_name: {title}
repo_url: {url}
docs_dir: pages
site_dir: ../_site
use_directory_urls: false
extra_css: [styles.css]
theme: {{name: material, font: false, features: [content.code.copy, navigation.sections, navigation.footer]}}
markdown_extensions: [admonition, attr_list, md_in_html, tables, pymdownx.superfences, pymdownx.highlight, toc: {{permalink: true}}]
validation: {{nav: {{omitted_files: warn, not_found: warn}}, links: {{anchors: warn, not_found: warn, unrecognized_links: warn}}}}
nav:
{nav}"""

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=['readme', 'site'])
    p.add_argument('--check', action='store_true', help='fail when README.md or one of its pictures is out of date')
    a = p.parse_args()
    if a.what=='readme': readme(get_config(), a.check)
    else: site(get_config())
