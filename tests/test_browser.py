"The explorer in a real JupyterLab, in a real browser: keyboard, themes, and what is left without a kernel."
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]
token = 'only-for-this-test'
chromium_args = '--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync --no-first-run'.split()
model = """import os
os.environ['OMP_NUM_THREADS'] = '1'
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from slm_begin.supernet import Supernet
cfg = GPTNeoXConfig(vocab_size=64, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, max_position_embeddings=32)
net = Supernet(GPTNeoXForCausalLM(cfg), 'tiny <b>model</b>')"""
shown = """from slm_begin.widgets import ParamBin, SubnetExplorer
explorer = SubnetExplorer(net, ParamBin.around(net.count(net.full), .3, .1))
explorer"""
asked = "print(f'now {net.count(explorer.subnet):,} {explorer.subnet}')"


def notebook(*sources):
    cells = [dict(cell_type='code', id=f'c{i}', metadata={}, source=s, outputs=[], execution_count=None) for i,s in enumerate(sources)]
    return dict(cells=cells, metadata=dict(kernelspec=dict(display_name='python3', language='python', name='python3')), nbformat=4, nbformat_minor=5)


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab of its own on loopback: address and folder. Nobody's settings are read or written."
    folder, dirs = tmp_path/'work', {f'JUPYTER_{o.upper()}_DIR': str(tmp_path/o) for o in ('config', 'data', 'runtime')}
    dirs |= dict(JUPYTERLAB_SETTINGS_DIR=str(tmp_path/'settings'), JUPYTERLAB_WORKSPACES_DIR=str(tmp_path/'workspaces'), IPYTHONDIR=str(tmp_path/'ipython'))
    folder.mkdir()
    (tmp_path/'config'/'labconfig').mkdir(parents=True)
    quiet = {'disabledExtensions': {'@jupyterlab/apputils-extension:announcements': True}}
    (tmp_path/'config'/'labconfig'/'page_config.json').write_text(json.dumps(quiet))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    log = open(tmp_path/'lab.log', 'w')
    server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0',
                               f'--IdentityProvider.token={token}', f'--ServerApp.root_dir={folder}', '--allow-root',
                               '--LabApp.extension_manager=readonly', '--expose-app-in-browser'],
                              cwd=folder, env=os.environ | dirs, stdout=log, stderr=log)
    try:
        address = f'http://127.0.0.1:{port}'
        for _ in range(240):
            if server.poll() is not None: break
            try:
                urllib.request.urlopen(f'{address}/api?token={token}', timeout=5)
                break
            except OSError: time.sleep(.25)
        else: pytest.fail('JupyterLab did not start within a minute: ' + (tmp_path/'lab.log').read_text()[-2000:])
        assert server.poll() is None, (tmp_path/'lab.log').read_text()[-2000:]
        yield address, folder
    finally:
        server.terminate()              # it stops its kernels
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()
        log.close()


@pytest.fixture
def page(chromium):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=chromium_args)
        page = browser.new_page(viewport=dict(width=1280, height=1000))
        page.set_default_timeout(120_000)
        yield page
        browser.close()


def run(page, command, **args): page.evaluate('([command, args]) => jupyterapp.commands.execute(command, args)', [command, args])


def open_notebook(page, address, name):
    "Show a notebook alone, and wait for its kernel."
    page.goto(f'{address}/doc/tree/{name}?token={token}&reset')
    page.locator('.jp-Notebook').wait_for()
    page.evaluate('async () => { const s = jupyterapp.shell.currentWidget.sessionContext; await s.ready; await s.session.kernel.info }')


def parameters(page):
    "The number that the live picture shows."
    text = page.locator('.jupyter-widgets .slm-verdict').inner_text()
    return int(re.search(r'([\d,]+) parameters:', text)[1].replace(',', ''))


def after(page, key, control):
    "Press a key on a control, wait until the picture shows another number; it."
    before = parameters(page)
    control.focus()
    page.keyboard.press(key)
    page.wait_for_function("before => !document.querySelector('.jupyter-widgets .slm-verdict').innerText.includes(before)", arg=f'{before:,} parameters:')
    return parameters(page)


def contrast(page, selector):
    "Contrast of a text with what lies behind it, as WCAG defines it: 1 to 21."
    colors = page.locator(selector).first.evaluate("""e => {
        const text = getComputedStyle(e).color
        while (e && /rgba\\(.*, 0\\)|transparent/.test(getComputedStyle(e).backgroundColor)) e = e.parentElement
        return [text, e ? getComputedStyle(e).backgroundColor : 'rgb(255, 255, 255)']}""")
    def luminance(color):
        linear = lambda v: v/12.92 if v<=.03928 else ((v + .055)/1.055)**2.4
        r,g,b = (linear(float(o)/255) for o in re.findall(r'[\d.]+', color)[:3])
        return .2126*r + .7152*g + .0722*b
    low,high = sorted(map(luminance, colors))
    return (high + .05)/(low + .05)


def test_explorer(lab, page, tmp_path):
    address, folder = lab
    file = folder/'explorer.ipynb'
    file.write_text(json.dumps(notebook(model, shown, asked)))
    open_notebook(page, address, file.name)
    run(page, 'notebook:run-all-cells')
    page.locator('.jupyter-widgets .slm-verdict').wait_for()
    slider = lambda name: page.locator('.widget-slider', has_text=name).locator('.noUi-handle')
    saved = page.locator('[class^=slm-saved]')

    # what is there, and that the copy for the file is hidden; the model's name is text
    assert saved.count()==1 and saved.is_hidden()
    assert 'tiny <b>model</b>' in page.locator('.jupyter-widgets .slm-title').inner_text()
    assert 'too large' in page.locator('.jupyter-widgets .slm-verdict').inner_text()

    # the keyboard moves sliders, ticks boxes and presses buttons
    whole = parameters(page)
    assert after(page, 'ArrowLeft', slider('width (embd)')) < whole
    assert slider('width (embd)').get_attribute('aria-valuetext')=='48'
    narrow = parameters(page)
    assert after(page, 'Space', page.get_by_label('layer 2')) < narrow
    assert slider('layers kept').get_attribute('aria-valuetext')=='3'
    page.get_by_label('layer by layer').press('Space')
    page.wait_for_function("() => document.querySelectorAll('.widget-slider').length == 2 + 2*3")      # a key before they all stand may be lost
    after(page, 'ArrowLeft', slider('layer 3: heads'))
    page.locator('.jp-Cell').nth(2).locator('.cm-content').click()
    page.keyboard.press('Control+Enter')
    page.locator('.jp-OutputArea-output', has_text=f'now {parameters(page):,} Subnet(layers 0-1,3, embd 48, heads [4, 4, 3], ffn 128)').wait_for()

    # what is not possible is said, and the box stays ticked
    for i in 0, 1: after(page, 'Space', page.get_by_label(f'layer {i}'))
    page.get_by_label('layer 3', exact=True).press('Space')
    page.get_by_role('alert').filter(has_text='one layer has to stay').wait_for()
    page.wait_for_function("() => document.querySelectorAll('.widget-checkbox input')[3].checked")

    # buttons; the line of code has the focus, ready to be copied
    after(page, 'Enter', page.get_by_role('button', name='one-shot'))
    assert 'inside the bin' in page.locator('.jupyter-widgets .slm-verdict').inner_text()
    page.get_by_role('button', name='copy as code').press('Enter')
    page.wait_for_function("() => document.activeElement.tagName == 'TEXTAREA' && document.activeElement.value.startsWith('supernet.subnet(')")

    # light and dark
    page.screenshot(path=tmp_path/'light.png')
    for theme in 'Light', 'Dark':
        run(page, 'apputils:change-theme', theme=f'JupyterLab {theme}')
        page.wait_for_function("dark => (document.body.dataset.jpThemeLight == 'false') == dark", arg=theme=='Dark')
        for what in '.slm-title', '.slm-verdict', '.slm-subnet td:last-child', '.slm-gauge span':
            assert contrast(page, f'.jupyter-widgets {what}') > 4.5, (theme, what)
    page.screenshot(path=tmp_path/'dark.png')

    # what the file keeps: the last state, seen when the kernel that had the sliders is gone
    last = f'{parameters(page):,} parameters: inside the bin'
    run(page, 'docmanager:save')
    outputs = json.loads(file.read_text())['cells'][1]['outputs']
    assert [last in re.sub('<[^>]+>', '', ''.join(o['data'].get('text/html', ''))) for o in outputs]==[False, True]
    sessions = f'{address}/api/sessions'
    auth = {'Authorization': f'token {token}'}
    for s in json.load(urllib.request.urlopen(urllib.request.Request(sessions, headers=auth))):
        urllib.request.urlopen(urllib.request.Request(f"{sessions}/{s['id']}", headers=auth, method='DELETE'))
    page.goto(f'{address}/doc/tree/{file.name}?token={token}&reset')
    saved.wait_for()
    assert last in saved.inner_text() and page.locator('.widget-slider').count()==0
    page.screenshot(path=tmp_path/'saved.png')


def test_a_drawing_in_a_notebook_that_is_not_trusted(lab, page, tmp_path):
    "As after a download: JupyterLab washes its HTML. The bars are still there, in both themes."
    from slm_begin.draw import draw_subnet
    drawn = draw_subnet(dict(layers=[0, 2], embd=[0, 2, 3], heads=[[0, 3], [1]], ffn=[40, 90]), dict(layers=3, embd=4, heads=4, ffn=100), title='<b>a</b>')
    address, folder = lab
    cell = dict(output_type='execute_result', execution_count=1, metadata={}, data={'text/html': str(drawn), 'text/plain': repr(drawn)})
    saved = notebook('drawn')
    saved['cells'][0]['outputs'] = [cell]
    (folder/'saved.ipynb').write_text(json.dumps(saved))
    open_notebook(page, address, 'saved.ipynb')
    table = page.locator('.slm-subnet')
    table.wait_for()
    assert not page.evaluate("() => jupyterapp.shell.currentWidget.content.widgets[0].model.trusted")
    assert table.inner_text().count('out')==2 and '<b>a</b>' in table.inner_text()
    for theme in 'Light', 'Dark':
        run(page, 'apputils:change-theme', theme=f'JupyterLab {theme}')
        page.wait_for_function("dark => (document.body.dataset.jpThemeLight == 'false') == dark", arg=theme=='Dark')
        bars = table.evaluate("t => [...t.querySelectorAll('td > div, td[rowspan]')].map(e => getComputedStyle(e).backgroundImage + e.offsetWidth)")
        assert len(bars)==7 and all('gradient' in o and not o.endswith(')0') for o in bars), bars
        assert sum('0, 114, 178' in o for o in bars)==sum('213, 94, 0' in o for o in bars)==2
        assert contrast(page, '.slm-subnet td:last-child') > 4.5, theme
        table.screenshot(path=tmp_path/f'{theme}.png')
