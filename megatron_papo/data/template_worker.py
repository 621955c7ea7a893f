"""The process that renders chat templates, so that the trainer never does. Run as a script; imports nothing of the
package.

A template is a program that comes with a model folder. Jinja's sandbox keeps it from files and code, but it may loop
for ever or make gigabytes of text from a few letters, in C code that nobody interrupts. Here a timer of the kernel ends
the process, and its memory is bounded. The first line on standard input is the template, each further one arguments of
it, all JSON; each is answered by a line, `{"text": ...}` or `{"error": ...}`.

The environment is that of `transformers.utils.chat_template_utils`, whose import takes seconds and hundreds of
megabytes; a test compares the two.
"""

import sys

if sys.path[:1] == [__file__.rpartition("/")[0]]:
    del sys.path[0]  # modules of this folder are not those that are meant below

import json
import resource
import signal
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MEMORY = 512 << 20  # bytes of address space beyond what there is before a template is seen
_MOST_LETTERS = 16 << 20


class GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it is only text."""

    tags = {"generation"}  # noqa: RUF012 - as jinja has it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


def main() -> None:
    """Serves until standard input ends; the only argument is the limit of processor time of a line, in seconds."""
    limit_s = float(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer decides when to end
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the default ends the process
    _limit_memory()
    template = None
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        try:
            given = json.loads(line.decode("utf-8", "surrogatepass"))
            if template is None:
                template, reply = environment().from_string(given), {"text": ""}
            else:
                reply = _limited(template.render(**given))
        except MemoryError:
            reply = {"error": "takes too much memory"}
        except RecursionError:
            reply = {"error": "is nested too deep"}
        except Exception as error:  # whatever a template does with what it is given
            reply = {"error": " ".join(f"{type(error).__name__}: {error}"[:1000].split())}
        answer = json.dumps(reply, ensure_ascii=False).encode("utf-8", "surrogatepass")
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


def environment() -> ImmutableSandboxedEnvironment:
    """What transformers renders in."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = _strftime_now
    return made


def _tojson(
    value: object, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _limited(text: str) -> dict[str, str]:
    return {"text": text} if len(text) <= _MOST_LETTERS else {"error": f"writes {len(text)} letters"}


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = taken + _MEMORY if hard == resource.RLIM_INFINITY else min(taken + _MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


if __name__ == "__main__":
    main()
