"tools/nb2md.py: what becomes of links, pictures, formulas and outputs."
import base64
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip('nbdev')
sys.path.insert(0, str(Path(__file__).parent.parent/'tools'))
import nb2md  # noqa: E402

png = base64.b64encode(b'\x89PNG one').decode()


@pytest.fixture
def media(tmp_path): return nb2md.Media(tmp_path/'images', 'readme', 'images')

def notebook(tmp_path, *cells):
    path = tmp_path/'a.ipynb'
    path.write_text(json.dumps({'cells': [{'metadata':{}, 'outputs':[], **o} for o in cells]}))
    return path

def md(s, **kw): return dict(cell_type='markdown', source=s, **kw)
def code(s, *outputs): return dict(cell_type='code', source=s, outputs=outputs)
def shown(**data): return dict(output_type='display_data', data={k.replace('_', '/'):v for k,v in data.items()})


def test_pictures_become_files_and_stale_ones_are_seen(tmp_path, media):
    pasted = md('![x](attachment:a b.png)', attachments={'a b.png': {'image/png':png}})
    nb = notebook(tmp_path, pasted, code('plot()', shown(image_png=png, text_plain='<Figure>')))
    out = nb2md.nb2md(nb, 'gfm', media)
    assert '![x](images/readme_1.png)' in out and '(images/readme_2.png)' in out and '<Figure>' not in out
    assert media.stale()==['readme_1.png', 'readme_2.png']
    media.write()
    assert not media.stale() and (media.folder/'readme_1.png').read_bytes()==b'\x89PNG one'
    (media.folder/'readme_1.png').write_bytes(b'other')
    (media.folder/'readme_9.png').write_bytes(b'left over')
    (media.folder/'mine.png').write_bytes(b'not ours')
    assert media.stale()==['readme_1.png', 'readme_9.png']
    media.write()
    assert sorted(o.name for o in media.folder.iterdir())==['mine.png', 'readme_1.png', 'readme_2.png']

def test_an_attachment_no_page_can_show_is_an_error(media):
    with pytest.raises(SystemExit, match='a.tiff'): nb2md.attached({'attachments': {'a.tiff': {'image/tiff':''}}}, '![](attachment:a.tiff)', media)

def test_links_between_pages():
    found = {Path('03_space.ipynb'), Path('tutorials/quickstart.ipynb')}
    link = lambda s, here: nb2md.relink(s, Path(here), 'https://h/b', 'https://repo', found)
    assert link('[a](../03_space.ipynb#moves)', 'tutorials/quickstart.ipynb')=='[a](../space.md#moves)'
    assert link('[a](tutorials/quickstart.ipynb)', 'index.ipynb')=='[a](tutorials/quickstart.md)'
    assert link('[a](https://h/b/space.html#x)', 'tutorials/quickstart.ipynb')=='[a](../space.md#x)'
    assert link('[a](../LICENSE) [b](https://x/y.ipynb) [c](#here)', 'index.ipynb')=='[a](https://repo/LICENSE) [b](https://x/y.ipynb) [c](#here)'
    assert link('```\n[a](03_space.ipynb)\n```', 'index.ipynb')=='```\n[a](03_space.ipynb)\n```'

def test_methods_get_the_anchors_that_nbdev_links_to():
    assert nb2md.anchors('### Supernet.Flops')=='### Supernet.Flops {#supernet.flops}'
    for s in '## Kept: [`Subnet`](supernet.md#subnet)', '## Version 2.4 -', '# plain', '### A.b {#a.b}': assert nb2md.anchors(s)==s

def test_pictures_that_say_what_they_show_have_an_alternative_text(media):
    out = lambda said: nb2md.output(shown(image_png=png, text_plain=said), 'site', media)
    assert out('Losses: a [1] 4.2;\n<b> & c_d.')=='![Losses: a &#91;1&#93; 4.2; &lt;b&gt; &amp; c&#95;d.](images/readme_1.png)'
    assert out('<Picture size 500x310 with 1 Axes>').startswith('![output of the code above](')

def test_outputs(media):
    out = lambda flavour='gfm', **kw: nb2md.output(shown(**kw), flavour, media)
    assert nb2md.output(dict(output_type='stream', text='1%\r 50%\r100%\n\x1b[31mred\x1b[0m\n'), 'gfm', media)=='```\n100%\nred\n```'
    assert out(text_html='<b>x</b>', text_plain='x')=='```\nx\n```' and '<b>x</b>' in out('site', text_html='<b>x</b>', text_plain='x')
    assert 'interactive control' in out(**{'application_vnd.jupyter.widget-view+json':{}, 'text_plain':'VBox()'})

def test_formulas():
    assert '<math' in nb2md.mathml('so $a_i * b$ is') and '*' not in nb2md.mathml('so $a_i * b$ is')
    assert '<div class="math"><math' in nb2md.mathml('$$x^2$$')
    for s in ('`$x$ and $y$`', '```\n$x$\n```', 'costs $5 or $6'): assert nb2md.mathml(s)==s

def test_code_can_be_folded(tmp_path, media):
    out = nb2md.nb2md(notebook(tmp_path, code('#| code-fold: true\n#| code-summary: "How"\nx = 1')), 'site', media)
    assert '<summary>How</summary>' in out and 'x = 1' in out and '#|' not in out

def test_navigation_follows_the_sidebar():
    assert ''.join(nb2md.nav(['index.ipynb', {'section':'Chapters', 'contents':['00_data.ipynb']}]))=='  - index.md\n  - "Chapters":\n      - data.md\n'
