"""What the teacher reads: English sentences made from a grammar of ours and the word lists inside hibari-tts.

hibari's tagger (Apache-2.0) brings some fourteen thousand frequent words with their part of speech, its lexicon
(misaki's, Apache-2.0) ninety thousand pronounceable ones. Everything is drawn from one seed.

    python -m training.mini.sentences 20        prints twenty
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from pathlib import Path

HELD_OUT_FILE = Path(__file__).with_name("heldout.txt")

# base, third person, past, participle in -ing; all take a thing or a person as object
VERBS = (
    """
find finds found finding|take takes took taking|bring brings brought bringing|keep keeps kept keeping
leave leaves left leaving|make makes made making|see sees saw seeing|hear hears heard hearing
write writes wrote writing|draw draws drew drawing|build builds built building|buy buys bought buying
sell sells sold selling|lose loses lost losing|hold holds held holding|catch catches caught catching
choose chooses chose choosing|break breaks broke breaking|wear wears wore wearing|hide hides hid hiding
feed feeds fed feeding|teach teaches taught teaching|forget forgets forgot forgetting|show shows showed showing
carry carries carried carrying|clean cleans cleaned cleaning|cook cooks cooked cooking|paint paints painted painting
open opens opened opening|close closes closed closing|watch watches watched watching|wash washes washed washing
follow follows followed following|push pushes pushed pushing|pull pulls pulled pulling|move moves moved moving
want wants wanted wanting|need needs needed needing|like likes liked liking|love loves loved loving
visit visits visited visiting|help helps helped helping|use uses used using|try tries tried trying
discover discovers discovered discovering|describe describes described describing|finish finishes finished finishing
change changes changed changing|explain explains explained explaining|measure measures measured measuring
repair repairs repaired repairing|remember remembers remembered remembering|check checks checked checking
collect collects collected collecting|protect protects protected protecting|share shares shared sharing
""".replace("\n", "|")
    .strip("|")
    .split("|")
)

PEOPLE = (
    """my mother|my father|her brother|his sister|our teacher|the doctor|the baker|the old farmer|a young girl
the boy next door|their neighbor|the captain|the driver|an engineer|the children|a stranger|the whole family|the nurse
the judge|our friends|the students|the crowd|a small team|the singer|the manager|everyone|nobody|somebody|the player
""".replace("\n", "|")
    .strip("|")
    .split("|")
)

PLACES = (
    """in the garden|at the station|near the river|behind the house|on the table|under the bridge|in the kitchen
at school|in the city|by the sea|on the roof|across the street|in the forest|at home|in the office|over the hill
beside the lake|inside the box|next to the window|at the market|along the coast|in front of the church|on the train
""".replace("\n", "|")
    .strip("|")
    .split("|")
)

TIMES = (
    """yesterday|today|tomorrow|last night|every morning|in the evening|after lunch|before dawn|on Monday|on Friday
last summer|next week|all day|at noon|in the winter|a long time ago|this afternoon|twice a year|on Sunday morning
at the end of the month|two days later|during the storm|from time to time|as soon as possible|right now|in May
""".replace("\n", "|")
    .strip("|")
    .split("|")
)

SHORT = (
    """Hello.|Good morning.|Good night.|Thank you.|Thank you very much.|You're welcome.|I'm sorry.|Excuse me.
How are you?|I'm fine, thanks.|What time is it?|Where are you going?|See you later.|See you tomorrow!|Of course.
No problem.|Come in, please.|Wait a minute.|I don't know.|I don't think so.|That's right.|That's not true!|Well done!
Be careful.|Hurry up!|Let's go.|Never mind.|What do you mean?|It doesn't matter.|Yes, please.|No, thanks.|Really?
What happened?|Who's there?|Why not?|Good luck!|Happy birthday!|Nice to meet you.|Can you hear me?|I can't believe it.
It's time to go.|Turn left at the corner.|Have a nice day.|I'll be right back.|We've got to leave.|They're here.
""".replace("\n", "|")
    .strip("|")
    .split("|")
)

FORMS = ("base", "third", "past", "ing")
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
JOINTS = ("and", "but", "so", "because", "while", "although", "when", "before", "after", "if", "until")
OPENERS = """In fact|Of course|However|Sometimes|After all|For example|Suddenly|At first|In the end|Fortunately
Meanwhile|On the other hand|To be honest|As a rule|Once upon a time""".replace("\n", "|").split("|")
PRONOUNS = ("I", "you", "we", "they")
SINGULAR = ("he", "she", "it")
UNITS = [
    "miles",
    "kilometers",
    "pounds",
    "dollars",
    "minutes",
    "hours",
    "days",
    "weeks",
    "years",
    "meters",
    "degrees",
    "people",
    "pages",
]


@dataclass(frozen=True)
class Words:
    """Words by part of speech, and all that can be pronounced; sorted, none of them held out."""

    nouns: list[str]
    plurals: list[str]
    adjectives: list[str]
    adverbs: list[str]
    names: list[str]
    common: list[str]
    rare: list[str]


def held_out() -> tuple[list[str], set[str]]:
    """The sentences never trained on, and the words that no training sentence contains (marked *so* in the file)."""
    sentences, words = [], set()
    for line in HELD_OUT_FILE.read_text("utf-8").splitlines():
        if line.strip():
            words |= {piece.lower() for piece in line.split("*")[1::2]}
            sentences.append(line.replace("*", "").strip())
    return sentences, words


def load_words() -> Words:
    spec = util.find_spec("hibari")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("hibari-tts is needed to make the sentences")
    assets = Path(spec.origin).parent / "assets"
    tagger = json.loads(gzip.decompress((assets / "tagger.json.gz").read_bytes()))
    lexicon = json.loads(gzip.decompress((assets / "lexicon_us_gold.json.gz").read_bytes()))
    barred = held_out()[1]

    def usable(word: str) -> bool:
        return word.isascii() and word.isalpha() and word.lower() not in barred and 2 < len(word) < 15

    def tagged(tag: str, title: bool = False) -> list[str]:
        right = str.istitle if title else str.islower
        return sorted(w for w, t in tagger["tagdict"].items() if t == tag and right(w) and usable(w) and w in lexicon)

    common = sorted(w for w in tagger["vocab"] if w.islower() and usable(w) and w in lexicon)
    known = set(common)
    rare = sorted(w for w in lexicon if w.islower() and usable(w) and w not in known)
    return Words(tagged("NN"), tagged("NNS"), tagged("JJ"), tagged("RB"), tagged("NNP", title=True), common, rare)


class Writer:
    """Draws sentences, one kind of many at a time."""

    def __init__(self, words: Words, seed: int):
        self.words, self.random = words, random.Random(seed)
        self.verbs = [dict(zip(FORMS, line.split(), strict=True)) for line in VERBS]
        self.kinds: tuple[tuple[int, Callable[[], str]], ...] = (
            (26, self.statement),
            (14, self.joined),
            (10, self.question),
            (14, self.scattered),
            (10, self.numeric),
            (6, self.dated),
            (8, self.named),
            (5, self.command),
            (4, self.short),
            (3, self.quoted),
        )

    def sentence(self) -> str:
        weights, kinds = zip(*self.kinds, strict=True)
        text = self.random.choices(kinds, weights)[0]()
        return text[0].upper() + text[1:]

    def pick(self, items: list[str] | tuple[str, ...]) -> str:
        return self.random.choice(items)

    def maybe(self, chance: float, text: Callable[[], str]) -> str:
        return text() if self.random.random() < chance else ""

    def thing(self) -> str:
        """A noun with its article, now and then with an adjective."""
        described = self.maybe(0.5, lambda: self.pick(self.words.adjectives) + " ")
        if self.random.random() < 0.3:
            some = self.pick(("the ", "these ", "many ", "some ", "our ", "their ", "", "two ", "those "))
            return some + described + self.pick(self.words.plurals)
        noun = described + self.pick(self.words.nouns)
        article = self.pick(("the", "the", "a", "this", "that", "my", "your", "his", "her", "our", "every", "another"))
        return ("an " if article == "a" and noun[0] in "aeiou" else article + " ") + noun

    def clause(self) -> str:
        verb, draw = self.pick(self.verbs), self.random.random()  # type: ignore[arg-type]
        if draw < 0.45:
            head = f"{self.pick((*PEOPLE, *PRONOUNS, *SINGULAR))} {verb['past']}"
        elif draw < 0.6:
            head = f"{self.pick(SINGULAR)} {verb['third']}"
        elif draw < 0.75:
            modal = self.pick(("will", "can", "could", "should", "must", "may", "didn't", "won't", "can't", "might"))
            head = f"{self.pick((*PEOPLE, *PRONOUNS, *SINGULAR))} {modal} {verb['base']}"
        elif draw < 0.85:
            head = f"{self.pick(('she was', 'he is', 'they were', 'we are', 'you are'))} {verb['ing']}"
        else:
            return f"{self.thing()} {self.pick(('was', 'is', 'became', 'seems'))} {self.describe()}"
        tail = self.maybe(0.45, lambda: " " + self.pick((*PLACES, *TIMES)))
        return f"{head} {self.thing()}{tail}"

    def describe(self) -> str:
        very = self.maybe(0.5, lambda: self.pick(("very", "quite", "too", "so", self.pick(self.words.adverbs))) + " ")
        return very + self.pick(self.words.adjectives)

    def statement(self) -> str:
        opener = self.maybe(0.15, lambda: self.pick(OPENERS) + ", ")
        adverb = self.maybe(0.15, lambda: " " + self.pick(self.words.adverbs))
        return f"{opener}{self.clause()}{adverb}{self.pick(('.', '.', '.', '.', '!'))}"

    def joined(self) -> str:
        comma = self.pick((",", "", ";"))
        text = f"{self.clause()}{comma} {self.pick(JOINTS)} {self.clause()}"
        return text + self.maybe(0.3, lambda: f", {self.pick(('and', 'but', 'or'))} {self.clause()}") + "."

    def question(self) -> str:
        verb, who = self.pick(self.verbs), self.pick((*PRONOUNS, "the children", "your friends"))  # type: ignore[arg-type]
        asked = self.pick(
            ("Do", "Did", "Can", "Could", "Will", "Should", "Why did", "When will", "Where did", "How do")
        )
        if self.random.random() < 0.25:
            return f"{self.pick(('Who', 'What', 'Which one'))} {verb['past']} {self.thing()}?"
        return f"{asked} {who} {verb['base']} {self.thing()}{self.maybe(0.3, lambda: ' ' + self.pick(TIMES))}?"

    def scattered(self) -> str:
        """Unrelated words, which make the spelling carry everything."""
        pool = self.words.rare if self.random.random() < 0.3 else self.words.common
        words = [self.pick(pool) for _ in range(self.random.randint(2, 9))]
        comma = ", " if self.random.random() < 0.4 else " "
        return comma.join(words) + self.pick((".", ".", "?"))

    def numeric(self) -> str:
        r = self.random
        number = r.choice((r.randint(0, 20), r.randint(0, 100), r.randint(100, 1000), r.randint(1000, 99_999)))
        forms = (
            lambda: f"It costs ${r.randint(1, 99)}.{r.randint(0, 99):02d}.",
            lambda: f"{number} {self.pick(UNITS)} is {self.describe()}.",
            lambda: f"There were {number} {self.pick(self.words.plurals)} {self.pick(PLACES)}.",
            lambda: f"The number is {r.randint(0, 9)}, {r.randint(0, 9)}, {r.randint(0, 9)}, {r.randint(0, 9)}.",
            lambda: f"About {r.randint(1, 100)}% of the {self.pick(self.words.plurals)} are {self.describe()}.",
            lambda: f"We need {r.randint(2, 12)} more {self.pick(self.words.plurals)}, not {r.randint(13, 60)}.",
            lambda: f"Page {r.randint(1, 400)}, chapter {r.randint(1, 30)}.",
            lambda: f"It's the {r.randint(1, 31)}th {self.pick(self.words.nouns)} on the list.",
        )
        return r.choice(forms)()

    def dated(self) -> str:
        r = self.random
        forms = (
            lambda: f"On {self.pick(MONTHS)} {r.randint(1, 28)}, {r.randint(1700, 2030)}, {self.clause()}.",
            lambda: f"It happened in {r.randint(1500, 2030)}.",
            lambda: f"The train leaves at {r.randint(1, 12)}:{r.randint(0, 59):02d} {self.pick(('am', 'pm'))}.",
            lambda: f"Let's meet on {self.pick(DAYS)} at {r.randint(1, 12)} o'clock.",
            lambda: f"{self.pick(DAYS)}, the {r.randint(4, 20)}th of {self.pick(MONTHS)}.",
        )
        return r.choice(forms)()

    def named(self) -> str:
        name, other = self.pick(self.words.names), self.pick(self.words.names)
        verb = self.pick(self.verbs)  # type: ignore[arg-type]
        forms = (
            f"{name} {verb['past']} {self.thing()}.",
            f"{name} and {other} {verb['past']} {self.thing()} {self.pick(TIMES)}.",
            f"{self.pick(('Mr.', 'Mrs.', 'Dr.'))} {name} lives in {other}.",
            f"Have you ever been to {name}?",
            f"My name is {name}, and this is {other}.",
            f"From {name} to {other}, {self.clause()}.",
        )
        return self.random.choice(forms)

    def command(self) -> str:
        please = self.pick(("Please ", "Don't ", "Always ", "Never ", "Let's ", ""))
        verb = self.pick(self.verbs)["base"]  # type: ignore[arg-type, index]
        return f"{please}{verb} {self.thing()} {self.pick((*PLACES, *TIMES))}{self.pick(('.', '!'))}"

    def short(self) -> str:
        return self.pick(SHORT)

    def quoted(self) -> str:
        said = self.pick(('"{}," said the {}.', '"{}," she told the {}.', '"{}," whispered the {}.'))
        return said.format(self.clause(), self.pick(self.words.nouns))


def sentences(count: int, seed: int = 0) -> list[str]:
    """`count` training sentences; none is held out, nor has a held-out word."""
    exact, barred = held_out()
    excluded = set(exact)
    writer, result = Writer(load_words(), seed), []
    while len(result) < count:
        text = writer.sentence()
        plain = "".join(c if c.isalpha() else " " for c in text.lower()).split()
        if text not in excluded and barred.isdisjoint(plain):
            result.append(text)
    return result


if __name__ == "__main__":
    print("\n".join(sentences(int(sys.argv[1]))))
