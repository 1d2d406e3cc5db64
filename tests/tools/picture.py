"""README's pictures of the widget: a real JupyterLab, a real browser, boxes drawn and dragged on a built-in photo.

python tests/tools/picture.py runs/demo-42/checkpoint.pth      a checkpoint of `make pretrain`; writes nbs/images/widget.{jpg,gif}
"""
import argparse
import io
import tempfile
from contextlib import contextmanager
from pathlib import Path

from browser import ROOT, Hand, chromium, opened, prepare
from PIL import Image

# of the photo coffee (CC0, Rachel Michetti), which the demo's pre-training has not seen: cup with saucer, and the cup
BOXES = (80, 30, 480, 370), (350, 190, 150, 45)


PATCH, GRIP = (200, 150), 40  # px: a query patch; where its border is taken
PLACES = (30, 20), (165, 30), (330, 150), (300, 230), (150, 120)  # px: where its corner is dragged to
FRAME_WIDTH, COLOURS = 420, 96
STEPS, MOVING_MS, ANSWER_MS = 5, 70, 1100


@contextmanager
def widget(checkpoint):
    "A hand on the widget in JupyterLab, which shows the photo."
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as home:
        prepare(Path(folder), Path(checkpoint).resolve(), photo='coffee')
        with chromium() as browser, opened(browser, 'jupyterlab', Path(folder), Path(home)) as page:
            yield Hand(page, Path(folder))


def take(hand, to):
    "Draw two boxes, wait for the answers, and save what is seen of the widget."
    page = hand.page
    hand.box(*BOXES[0])
    page.keyboard.down('Shift')
    hand.drag(*BOXES[1])
    page.keyboard.up('Shift')
    print(hand.wait(lambda s: len(s['boxes']) == len(s['marks']) == 2)['text'])
    page.wait_for_timeout(2000)
    page.mouse.move(5, 5)
    page.locator('.jp-OutputArea-output:has(.updetr-photo)').last.screenshot(path=str(to), type='jpeg', quality=85)


def film(hand, to):
    "Draw a box and drag it over the photo, and see each time what the model finds."
    page, frames, times = hand.page, [], []

    def frame(ms):
        image = Image.open(io.BytesIO(hand.photo().screenshot())).convert('RGB')
        height = round(image.height * FRAME_WIDTH / image.width)
        frames.append(image.resize((FRAME_WIDTH, height), Image.LANCZOS))
        times.append(ms)

    def drag(start, end):
        page.mouse.move(*hand.path(start)[0])
        page.mouse.down()
        for i in range(1, STEPS + 1):
            page.mouse.move(*hand.path([a + (b - a) * i / STEPS for a, b in zip(start, end)])[0])
            frame(MOVING_MS)
        sent = hand.state()['sent']
        page.mouse.up()
        hand.wait(lambda s: s['sent'] > sent and len(s['marks']) == 1)
        page.wait_for_timeout(800)  # the browser has drawn the answer
        page.mouse.move(5, 5)
        frame(ANSWER_MS)

    width, height = PATCH
    drag(PLACES[0], (PLACES[0][0] + width, PLACES[0][1] + height))
    for (x, y), (x2, y2) in zip(PLACES, PLACES[1:]):
        drag((x + GRIP, y), (x2 + GRIP, y2))  # by the upper border
    palette = frames[-1].quantize(COLOURS)
    frames = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    frames[0].save(to, save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='pictures of the widget')
    parser.add_argument('checkpoint', help='of a pre-training')
    images = ROOT / 'nbs/images'
    with widget(parser.parse_args().checkpoint) as hand:
        take(hand, images / 'widget.jpg')
        hand.button('clear').click()
        film(hand, images / 'widget.gif')
    for to in (images / 'widget.gif', images / 'widget.jpg'): print(f'{to.relative_to(ROOT)}: {to.stat().st_size / 1000:.0f} KB')
