"`nbs/localize.ipynb` in real programs and a real browser: drags, keys, uploads, as a person does them; screenshots in tests/artifacts."
import dataclasses
import re
from importlib.util import find_spec

import pytest
import torch
from PIL import Image

from updetr.checkpoint import save_checkpoint
from updetr.config import make_config, model_options
from updetr.localizer import QueryPatchLocalizer
from updetr.oneshot import build_oneshot, oneshot_config
from updetr.photos import builtin_photos
from updetr.updetr import build_updetr

playwright = pytest.importorskip('playwright.sync_api', reason='the browser tests need playwright: pip install playwright')
from tools.browser import CHROMIUM, Hand, chromium, opened, prepare  # noqa: E402 (needs playwright)

pytestmark = pytest.mark.skipif(not CHROMIUM, reason='the browser tests need Chromium: apt install chromium fonts-dejavu, or name it by '
                                                     'the environment variable CHROMIUM')
PATHS = {p.name: p.path for p in builtin_photos()}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "The notebook with two small random models, and a last cell that writes down what the kernel knows."
    here = tmp_path_factory.mktemp('lab')
    small = dict(backbone='resnet18', weights='none', features='layer2', hidden_dim=32, nheads=4, dim_feedforward=32, dec_layers=2,
                 num_queries=12)
    pre, one = make_config('demo', **small, num_patches=4, patch_size=32, view_size=96), oneshot_config('demo', **small, query_size=32)
    torch.manual_seed(0)
    for name, cfg, build in (('pre', pre, build_updetr), ('one', one, build_oneshot)):
        model = build(**model_options(cfg))
        torch.nn.init.normal_(model.query_embed.weight)  # random weights answer always the same; these can be told apart
        model.bbox_embed.layers[-1].weight.data *= 20
        save_checkpoint(here / f'{name}.pth', {'model': model.state_dict(), 'args': dataclasses.asdict(cfg)})
    prepare(here, 'pre.pth', 'one.pth')
    Image.open(PATHS['coffee']).resize((900, 600)).save(here / 'mine.jpg')
    (here / 'bad.jpg').write_bytes(b'this is not a photo')
    return here


@pytest.fixture(scope='module')
def browser():
    "One Chromium for all tests."
    with chromium() as browser: yield browser


@pytest.fixture(scope='module')
def lab(browser, folder, tmp_path_factory):
    "The notebook in JupyterLab."
    with opened(browser, 'jupyterlab', folder, tmp_path_factory.mktemp('jupyter')) as page: yield page


@pytest.fixture
def hand(lab, folder):
    "The photo of the start, one known box, nothing switched on."
    hand = Hand(lab, folder)
    hand.choose('photo', 'chelsea')
    hand.choose('find it in', 'the same photo')
    hand.page.get_by_role('button', name='clear').click()
    hand.wait(lambda s: s['photo'] == 'chelsea' and s['target'] == 'the same photo' and s['boxes'] == [])
    hand.box(40, 50, 140, 150)
    return hand


def test_the_widget_is_on_the_first_screen(lab, folder):
    hand = Hand(lab, folder)
    hand.shot('1_first_screen')
    r = hand.photo().bounding_box()
    assert r['y'] > 0 and r['y'] + r['height'] < 1000 and 250 < r['width'] <= 620
    assert abs(r['width'] / r['height'] - 451 / 300) < .02
    assert lab.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0
    assert hand.drawn() == hand.state()['boxes'] == [[135, 90, 316, 210]] and len(hand.answers()) == 1


def test_drag(hand, folder):
    before = hand.state()['sent']
    state = hand.box(120, 80, 260, 200)
    assert hand.drawn() == [[120, 80, 260, 200]] and state['sent'] == before + 1, 'one message for one drag'
    found = QueryPatchLocalizer.from_checkpoint(folder / 'pre.pth')(PATHS['chelsea'], [[120, 80, 260, 200]])
    assert torch.allclose(torch.tensor(state['marks'][0]['box']), found.boxes[0], atol=.1)
    hand.page.wait_for_function('t => [...document.querySelectorAll(".answers text")].some(e => e.textContent === t)',
                                arg=f'1: {found.scores[0]:.2f}')
    hand.shot('2_drag')


def test_drag_backwards_and_out_of_the_photo(hand):
    sent, seen = hand.state()['sent'], []
    hand.drag(260, 200, -30, -20, during=lambda: seen.extend([hand.drawn(), hand.state()['sent']]))
    assert seen == [[[0, 0, 260, 200]], sent], 'drawn by the browser alone while it is dragged'
    hand.wait(lambda s: s['boxes'] == [[0, 0, 260, 200]])
    hand.drag(300, 200, 900, 150)
    hand.wait(lambda s: s['boxes'] == [[300, 150, 451, 200]])
    assert hand.drawn() == [[300, 150, 451, 200]]


def test_a_click_draws_nothing(hand):
    sent = hand.state()['sent']
    hand.drag(200, 200, 201, 202)
    hand.page.wait_for_timeout(300)
    assert hand.drawn() == [[40, 50, 140, 150]] and hand.state()['sent'] == sent


def test_two_patches_moved_and_resized(hand):
    hand.page.keyboard.down('Shift')
    hand.drag(200, 100, 320, 220)
    hand.page.keyboard.up('Shift')
    state = hand.wait(lambda s: len(s['boxes']) == 2 and len(s['marks']) == 2)
    assert state['boxes'] == [[40, 50, 140, 150], [200, 100, 320, 220]] and {m['patch'] for m in state['marks']} == {0, 1}
    lines = hand.photo().locator('.queries .line:not(.light)').all()
    assert len({e.get_attribute('stroke') for e in lines}) == 2
    hand.drag(260, 100, 280, 120)  # by the upper border
    hand.wait(lambda s: s['boxes'][1:] == [[220, 120, 340, 240]])
    hand.drag(140, 150, 160, 130)  # by the lower right corner
    hand.wait(lambda s: s['boxes'] == [[40, 50, 160, 130], [220, 120, 340, 240]])
    hand.shot('3_two_patches')


def test_keyboard(hand):
    box = hand.photo().locator('[data-box="0"]')
    box.focus()
    step = 5  # a hundredth of 451 px
    box.press('ArrowRight'), box.press('ArrowUp')
    hand.wait(lambda s: s['boxes'] == [[40 + step, 50 - step, 140 + step, 150 - step]])
    box.press('Shift+ArrowDown'), box.press('Shift+ArrowLeft')
    hand.wait(lambda s: s['boxes'] == [[40 + step, 50 - step, 140, 150]])
    slider = hand.control('.widget-hslider', 'x')
    playwright.expect(slider.locator('.widget-readout')).to_have_text(re.compile(f'^{40 + step}\\D+140$'))  # it follows the box
    slider.locator('.noUi-handle').first.press('ArrowRight')
    hand.wait(lambda s: s['boxes'] == [[41 + step, 50 - step, 140, 150]])
    box.focus()
    box.press('Delete')
    state = hand.wait(lambda s: s['boxes'] == [])
    assert 'Drag a box' in state['text'] and state['marks'] == []
    assert hand.page.locator('.jp-Cell').count() == 7, 'no key of the box reached the notebook'


def test_another_target_photo(hand):
    hand.choose('find it in', 'coffee')
    state = hand.wait(lambda s: s['target'] == 'coffee' and len(s['other']) == 1)
    assert state['marks'] == [] and 'IoU' not in state['text']
    hand.page.wait_for_function('document.querySelectorAll(".updetr-photo")[1]?.querySelector(".answers text")')
    assert hand.answers(0) == [] and hand.photo(1).is_visible() and hand.photo(1).get_attribute('viewBox') == '0 0 600 400'
    hand.shot('4_target')
    hand.choose('find it in', 'the same photo')
    hand.wait(lambda s: len(s['marks']) == 1)
    hand.photo(1).wait_for(state='hidden')


def test_uploads(hand):
    hand.upload('bad.jpg', 'another photo')
    hand.wait(lambda s: 'bad.jpg: broken image' in s['text'])
    hand.shot('5_bad_upload')
    hand.box(60, 60, 200, 160)
    hand.upload('mine.jpg', 'another photo')
    hand.wait(lambda s: s['photo'] == 'mine.jpg' and len(s['marks']) == 1)
    hand.page.wait_for_function('document.querySelector(".updetr-photo").getAttribute("viewBox") === "0 0 900 600"')
    hand.box(100, 100, 700, 500)
    hand.shot('6_upload')
    hand.upload('mine.jpg', 'another target')
    hand.wait(lambda s: s['target'] == 'mine.jpg' and len(s['other']) == 1)


def test_threshold_and_all_answers(hand):
    handle = hand.control('.widget-hslider', 'threshold').locator('.noUi-handle')
    handle.press('End')
    state = hand.wait(lambda s: s['threshold'] == 1)
    hand.wait(lambda s: s['marks'] == [] and 'No answer has a score of 1.00' in s['text'])
    hand.page.wait_for_function('!document.querySelector(".updetr-photo .answers text")')
    handle.press('Home')
    hand.wait(lambda s: s['threshold'] == 0 and len(s['marks']) == 1)
    hand.page.get_by_role('button', name='all answers').click()
    state = hand.wait(lambda s: len(s['marks']) > 1)
    assert len(state['marks']) <= 3, 'a group of 12 / 4 object queries'
    hand.shot('7_all_answers')
    hand.page.get_by_role('button', name='best of each patch').click()
    hand.wait(lambda s: len(s['marks']) == 1)


def test_attention_changes_and_weights(hand):
    hand.photo().locator('.answers text').first.click()
    hand.wait(lambda s: s['heat'] > 0)
    hand.page.wait_for_selector('.updetr-photo >> nth=0 >> image.heat[visibility=visible]')
    hand.shot('8_attention')
    hand.photo().locator('.answers text').first.click()
    hand.wait(lambda s: s['heat'] == 0)
    first = hand.state()['text']
    for change in ('jitter', 'blur', 'grey', 'flip', 'scale'): hand.page.get_by_role('button', name=change, exact=True).click()
    hand.wait(lambda s: s['text'] != first)
    hand.shot('9_changed')
    for change in ('jitter', 'blur', 'grey', 'flip', 'scale'): hand.page.get_by_role('button', name=change, exact=True).click()
    for weights in ('one-shot', 'untrained', 'pre-trained'):
        hand.page.get_by_role('button', name=weights, exact=True).click()
        hand.wait(lambda s, w=weights: s['weights'] == w and 'found' in s['text'] and ('learnt nothing' in s['text']) == (w == 'untrained'))


@pytest.mark.parametrize('front', ['notebook', 'voila'])
def test_other_programs(front, browser, folder, tmp_path):
    "The same widget in Jupyter Notebook 7 and in Voilà, where they are installed: a drag, a key, another target, a bad upload."
    if not find_spec(front): pytest.skip(f'needs {front}: pip install {front}')
    (folder / 'state.json').unlink(missing_ok=True)
    with opened(browser, front, folder, tmp_path) as page:
        hand = Hand(page, folder)
        page.wait_for_timeout(500)
        hand.box(120, 80, 260, 200)
        box = hand.photo().locator('[data-box="0"]')
        box.focus()
        box.press('ArrowRight')
        hand.wait(lambda s: s['boxes'] == [[125, 80, 265, 200]])
        hand.upload('bad.jpg', 'another photo')
        hand.wait(lambda s: 'bad.jpg: broken image' in s['text'])
        hand.choose('find it in', 'coffee')
        hand.wait(lambda s: s['target'] == 'coffee' and len(s['other']) == 1)
        page.wait_for_function('document.querySelectorAll(".updetr-photo")[1]?.querySelector(".answers text")')
        hand.shot(f'10_{front}')
