import sys
from importlib import import_module

# command: (module and function that takes the words after it, what it does)
# a module is imported when its command is called
COMMANDS = {
    'predict': ('updetr.predict.commands:predict_command',
                'draws what a checkpoint finds in photos and videos'),
    'evaluate': ('updetr.predict.commands:evaluate_command',
                 'reports what a detector gets wrong on labelled photos'),
    'localize': ('updetr.predict.widget:localize',
                 'drag boxes on a photo in the browser, without Jupyter'),
}
HELP = '''python -m updetr COMMAND ...                 each explains itself: --help
{}
python -m updetr --cfg runs/NAME/cfg.json    trains what a run's folder says; notebooks start it
python -m updetr.bench                       measures this machine'''


def main(words):
    "Do what a command line asks for; with `--cfg` it is a trainer, as a launch starts it."
    name, *rest = words or ['--help']
    if name in COMMANDS:
        module, function = COMMANDS[name][0].split(':')
        try:
            return getattr(import_module(module), function)(rest)
        # what the user can mend is said in a line
        except (ValueError, OSError, ImportError) as e:
            sys.exit(f'python -m updetr {name}: {e}')
    if name in ('-h', '--help'):
        lines = [f'  {command:10} {about}' for command, (_, about) in COMMANDS.items()]
        return print(HELP.format('\n'.join(lines)))
    if name.startswith('-'): return import_module('updetr.train.loop').main()
    sys.exit(f'python -m updetr: there is no command {name!r}, but {", ".join(COMMANDS)}')


main(sys.argv[1:])
