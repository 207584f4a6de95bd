"draw: what is coloured is what is kept, for any sub-network; and the page is harmless."
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from conftest import tiny_model

from slm_begin.draw import PARTS, draw_subnet, draw_subnets, stripes
from slm_begin.importance import orders
from slm_begin.space import ParamBin, SearchSpace
from slm_begin.supernet import Subnet, Supernet


def painted(css):
    "The part of a bar that is coloured, faint stripes as much as they are faint."
    total, at = 0., 0.
    for color, to in re.findall(r'(#\w+|transparent) 0 ([\d.]+)%', css):
        alpha = 0 if color=='transparent' else 1 if len(color)==7 else int(color[7:], 16)/255
        total, at = total + alpha*(float(to) - at), float(to)
    return total/100

@pytest.mark.parametrize('size', [1, 2, 16, 17, 63, 64, 65, 100, 1000, 16384])
def test_a_bar_is_coloured_as_far_as_entries_are_kept(size):
    rng = random.Random(size)
    for n in sorted({1, size//3 or 1, size}):
        low, high = n/size, n/size
        if size <= 16: low *= .89                                       # blocks with gaps
        assert low - .002 <= painted(stripes(n, size, '#000000')) <= high + .002
        kept = rng.sample(range(size), n)
        css = stripes(kept, size, '#000000')
        assert css==stripes(sorted(kept), size, '#000000')              # the order of what is kept is not seen
        low, high = low - .002, high + .002 if size <= 64 else min(1, high + .25) + .002      # a stripe is at most a quarter too dark
        assert low <= painted(css) <= high

class Page(HTMLParser):
    "Balanced tags, and all attributes."
    void = {'col', 'br'}
    def __init__(self, page):
        super().__init__()
        self.open, self.attrs, self.texts = [], [], []
        self.feed(page)
        assert not self.open
    def handle_starttag(self, tag, attrs):
        self.attrs += attrs
        if tag not in self.void: self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop()==tag
    def handle_data(self, data): self.texts.append(data)

@pytest.mark.parametrize('kind', ['coarse-uniform', 'coarse-layerwise', 'fine-uniform', 'fine-layerwise'])
def test_every_granularity_of_a_space(kind):
    net, rng = Supernet(tiny_model()), random.Random(0)
    space, bin = SearchSpace(net, kind, orders('random', net)), ParamBin.around(net.count(net.full), .5, .1)
    for _ in range(20):
        sub = space.sample(rng, bin)
        page = Page(sub._repr_html_())
        assert page.texts.count('out')==2*(net.sizes['layers'] - len(sub.layers))
        for n in [*map(len, sub.heads), *map(len, sub.ffn)]: assert str(n) in page.texts
        fills = [painted(v) for k,v in page.attrs if k=='style' and PARTS['ffn'][1] in v]
        assert all(abs(f - len(kept)/48) < .003 for f, kept in zip(fills, reversed(sub.ffn), strict=True))
        if kind.startswith('coarse'):                                   # in the order of the space it is the beginning of each bar
            assert str(draw_subnet(sub, order=space.orders))==str(draw_subnet(sub.sizes, net.sizes))

def test_what_is_not_part_of_a_sub_network():
    "The teacher's sizes do not count when two are compared, and are not written down; who does not know them draws open frames."
    net = Supernet(tiny_model())
    sub = net.subnet([0, 2], 16, 2, 24)
    again = Subnet.from_json(sub.to_json())
    assert again==sub and hash(again)==hash(sub) and again.key==sub.key and again.of is None and 'of' not in repr(sub)
    assert 'of 3 layers' in sub._repr_html_() and 'border-right:none' not in sub._repr_html_()
    assert 'border-right:none' in again._repr_html_() and ' of ' not in again._repr_html_().alt

def test_a_teacher_with_layers_of_different_sizes():
    page = draw_subnet(dict(layers=[0], embd=4, heads=[1], ffn=[30]), dict(layers=[0, 1], embd=8, heads=[2, 4], ffn=[60, 120]))
    assert 'heads 1 of 2 to 4, feed-forward 30 of 60 to 120' in page.alt and 'width:50%;height' in page

def test_titles_are_text():
    evil = '"><script>alert(1)</script>'
    page = draw_subnets({evil: dict(layers=[0], embd=4, heads=[1], ffn=[3])}, dict(layers=1, embd=8, heads=2, ffn=6))
    assert '<script' not in page and evil in Page(page).texts and dict(Page(page).attrs)['aria-label'].startswith(evil)

def test_orders_may_be_any_object_with_these_lists():
    sub, teacher = dict(layers=[1], embd=[7, 6], heads=[[1]], ffn=[[5, 4]]), dict(layers=2, embd=8, heads=2, ffn=6)
    order = dict(embd=[*range(7, -1, -1)], heads=[[0, 1], [1, 0]], ffn=[[*range(6)], [5, 4, 3, 2, 1, 0]])
    want = draw_subnet(dict(layers=[1], embd=2, heads=[1], ffn=[2]), teacher)
    assert draw_subnet(sub, teacher, order)==draw_subnet(sub, teacher, SimpleNamespace(**order))==want

def test_drawing_needs_no_plotting_library():
    code = "import sys, slm_begin.draw; print([o for o in ('torch', 'matplotlib', 'IPython', 'ipywidgets') if o in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout.strip()=='[]'
