"""README's picture of the widget: a real JupyterLab, a real browser, two boxes drawn on a built-in photo.

python tests/tools/picture.py runs/demo-42/checkpoint.pth      a checkpoint of `make pretrain`; writes nbs/images/widget.jpg
"""
import argparse
import tempfile
from pathlib import Path

from browser import ROOT, Hand, chromium, opened, prepare

# of the photo coffee (CC0, Rachel Michetti), which the demo's pre-training has not seen: cup with saucer, and the cup
BOXES = (80, 30, 480, 370), (150, 45, 350, 190)


def take(checkpoint, to):
    "Draw, wait for the answers, and save what is seen of the widget."
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as home:
        prepare(Path(folder), Path(checkpoint).resolve(), photo='coffee')
        with chromium() as browser, opened(browser, 'jupyterlab', Path(folder), Path(home)) as page:
            hand = Hand(page, Path(folder))
            hand.box(*BOXES[0])
            page.keyboard.down('Shift')
            hand.drag(*BOXES[1])
            page.keyboard.up('Shift')
            print(hand.wait(lambda s: len(s['boxes']) == len(s['marks']) == 2)['text'])
            page.wait_for_timeout(2000)
            page.mouse.move(5, 5)
            to.parent.mkdir(exist_ok=True)
            page.locator('.jp-OutputArea-output:has(.updetr-photo)').last.screenshot(path=str(to), type='jpeg', quality=85)
    print(f'{to.relative_to(ROOT)}: {to.stat().st_size / 1000:.0f} KB')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='a picture of the widget')
    parser.add_argument('checkpoint', help='of a pre-training')
    take(parser.parse_args().checkpoint, ROOT / 'nbs/images/widget.jpg')
