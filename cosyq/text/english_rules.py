"""Where English text is not plain words: the patterns of its spans, each with its reading, first match wins."""

from __future__ import annotations

from functools import cache

from cosyq.text.english import (
    UNIT,
    YEAR,
    abbreviated_end,
    address,
    cardinal,
    cased,
    clock,
    coded,
    components,
    date,
    day_month,
    decade,
    fraction,
    interval,
    measure,
    money,
    month,
    month_day,
    number,
    numbers,
    ordinal,
    paired,
    plain_fraction,
    roman,
    spelled,
    version,
    year,
)
from cosyq.text.spans import (
    BARE_URL,
    EMAIL,
    FILE,
    FRACTIONS,
    INTEGER,
    IP,
    NUMBER,
    PICTURE,
    TAG,
    URL,
    Reader,
    Rule,
)

MONTH = r"(?:Jan(?:uary|\.)?|Feb(?:ruary|\.)?|Mar(?:ch|\.)?|Apr(?:il|\.)?|May|June?\.?|July?\.?|Aug(?:ust|\.)?"
MONTH += r"|Sept?(?:ember|\.)?|Oct(?:ober|\.)?|Nov(?:ember|\.)?|Dec(?:ember|\.)?)"
DAY = r"(?:3[01]|[12]\d|0?[1-9])"
CODES = {"USD": "US dollars", "EUR": "euros", "GBP": "pounds", "CNY": "yuan", "RMB": "yuan", "JPY": "yen"}
ABBREVIATIONS = {
    "Mr": "Mister",
    "Mrs": "Missus",
    "Ms": "Miz",
    "Dr": "Doctor",
    "Prof": "Professor",
    "St": "Saint",
    "Gen": "General",
    "Capt": "Captain",
    "Col": "Colonel",
    "Lt": "Lieutenant",
    "Sgt": "Sergeant",
    "Gov": "Governor",
    "Rev": "Reverend",
}
STREETS = {"St": "Street", "Ave": "Avenue", "Rd": "Road", "Blvd": "Boulevard"}
NO_STREET = "Visit|In|At|To|From|The|Near|And|Of|By|Both|Dear|Is|Our"  # before "St." they leave it a saint
COUNTED = {
    "No": "Number",
    "no": "number",
    "Nos": "Numbers",
    "nos": "numbers",
    "Vol": "Volume",
    "vol": "volume",
    "Fig": "Figure",
    "fig": "figure",
    "Ch": "Chapter",
    "Sec": "Section",
    "Eq": "Equation",
    "p": "page",
    "pp": "pages",
}
SYMBOLS = {
    "+": "plus",
    "=": "equals",
    "×": "times",
    "*": "times",
    "x": "times",
    "÷": "divided by",
    "/": "divided by",
    "<": "is less than",
    ">": "is greater than",
    "≤": "is at most",
    "≥": "is at least",
    "≈": "is about",
    "≠": "is not",
    "±": "plus or minus",
}
COUNTS = "people|men|women|children|feet|meters|times|percent|points|or more|copies"
NOT_PLURAL = "is|was|has|as|its|this|us|his|does|goes|says|sees|brings|marks|saw|versus"
SOFTWARE = (
    r"[Vv]ersion|[Vv]er\.|Python|Node(?:\.js)?|Java|Go|Ruby|PHP|Rust|Perl|Ubuntu|Debian|Fedora|iOS|iPadOS|Android|macOS"
    r"|CUDA|PyTorch|TensorFlow|NumPy|Linux|Kubernetes|Django|Bluetooth|USB|HTTP|Swift|Kotlin|Firefox|Chrome|torch|numpy"
)
NUMBERED = "Room|Flight|Route|Highway|Boeing|Airbus|RTX|GTX|Suite|Apartment|Area|Bus|Gate|Interstate|Building|Unit"
RULERS = "Louis|Henry|Charles|George|Edward|William|James|Richard|Elizabeth|Napoleon|Philip|Frederick|Nicholas|Benedict"
RULERS += "|Pius|Paul|Alexander|Catherine|Ferdinand|Francis|Otto|Gregory|Leo"
PARTS = "World War|Chapter|Act|Scene|Section|Volume|Book|Phase|Type|Class|Level|Article|Appendix|Part|Stage|Super Bowl"

_PHONE = (
    r"(?<![\w.+-])\+?(?:1[-. ]?)?\(\d{3}\)[-. ]?\d{3}[-. ]\d{4}(?![\w-])"
    r"|(?<![\w.+-])\+\d{1,3}(?:[- ]\(?\d{1,5}\)?){1,5}(?![\w-])"
    r"|(?<![\w.+-])(?:1[-.])?\d{3}[-.]\d{3}[-.]\d{4}(?![\w-])"
    r"|(?<![\w.+-])\(\d{2,5}\)[- ]?\d{3,4}[- ]\d{3,4}(?![\w-])"
    r"|(?<![\w.-])\d{3}-\d{4}(?![\w-])"
    r"|(?<![\w.-])1[3-9]\d(?:\d{8}|[- ]\d{4}[- ]\d{4})(?![\w-])"
    r"|(?<![\w.-])\d++(?:-\d++){2,}+(?![\w-])"
    r"|(?<!\w)911(?![\w,]|\.\d)"
)
_START = r"(?<![\w.])"
_ARTICLE = r"(?P<article>(?<=\b[Aa]\s)|(?<=\b[Aa]n\s))?"  # a five dollar bill
_SIGN = r"(?P<sign>(?<![\w)\].])[-−](?=\d))?"

RULES: list[Rule] = [
    (TAG, lambda m: m[0]),
    (PICTURE, lambda m: ""),
    (URL, lambda m: address(m[0])),
    (EMAIL, lambda m: address(m[0])),
    (BARE_URL, lambda m: address(m[0])),
    (IP + r"(?::\d++)?", lambda m: " ".join({".": "dot", ":": "colon"}.get(c) or spelled(c) for c in m[0])),
    # Dates
    (
        rf"{_START}(?P<y>{YEAR})(?P<s>[-/.])(?P<m>0?[1-9]|1[0-2])[-/.](?P<d>{DAY})(?![\w/-])",
        lambda m: date(m[0], m["d"], m["m"], m["y"]),
    ),
    (
        rf"{_START}(?P<m>\d\d?)[-/.](?P<d>\d\d?)[-/.](?P<y>{YEAR})(?![\w/-])",
        lambda m: date(m[0], m["d"], m["m"], m["y"]),
    ),
    (
        rf"\b(?P<month>{MONTH})\s(?P<day>{DAY})(?:st|nd|rd|th)?(?:\s?[-–]\s?(?P<to>{DAY})(?:st|nd|rd|th)?)?"
        rf"(?![\w:%]|[.,]\d)(?:,?\s(?P<year>{YEAR})(?!\w))?",
        month_day,
    ),
    (rf"{_START}(?P<day>{DAY})\s(?P<month>{MONTH})(?![\w])(?:,?\s(?P<year>{YEAR})(?!\w))?", day_month),
    (rf"\b(?P<month>{MONTH}),?\s(?P<year>{YEAR})(?!\w)", lambda m: f"{month(m['month'])} {year(m['year'])}"),
    # Codes, versions, telephone numbers
    (_PHONE, lambda m: numbers(m[0])),
    (
        r"\b(?P<verb>[Cc]all|[Dd]ial|[Tt]ext|extension|ext\.)\s(?P<n>\d{3,}+)(?![\w,.-]*\d)",
        lambda m: f"{m['verb']} {spelled(m['n'])}",
    ),
    (
        rf"\b(?P<name>{SOFTWARE})\s(?P<n>\d++(?:\.\d++)++)",
        lambda m: f"{m['name'].replace('.js', ' JS')} {components(m['n'])}",
    ),
    (rf"{_START}(?P<v>[vV])(?P<n>\d++(?:\.\d++)*+)(?!\w)", version),
    (rf"{_START}(?P<v>)(?P<n>\d++(?:\.\d++){{2,}}+)", version),
    (FILE, lambda m: address(m[0])),
    # Clock times, scores
    (
        r"(?<![\w:.])(?P<hours>\d\d?):(?P<minutes>[0-5]\d)(?::(?P<seconds>[0-5]\d))?"
        r"(?:\s?(?P<noon>[AaPp]\.[Mm]\.(?=\s+[a-z]|[,;])|[AaPp]\.?[Mm](?!\w)))?(?![\w:])",
        clock,
    ),
    (
        r"(?<![\w:.])(?P<hours>1[0-2]|0?[1-9])\s?(?P<noon>[AaPp]\.[Mm]\.(?=\s+[a-z]|[,;])|[AaPp]\.?[Mm](?!\w))",
        lambda m: f"{cardinal(str(int(m['hours'])))} {m['noon'].replace('.', '').upper()}",
    ),
    (r"(?<![\w:.])(?P<a>\d++):(?P<b>\d++)(?![\w:])", lambda m: f"{cardinal(m['a'])} to {cardinal(m['b'])}"),
    # Money
    (
        rf"{_ARTICLE}(?P<sign>(?<!\w)[-−])?(?:(?<![A-Za-z])(?P<country>US|AU?|CA?|HK|NZ|S))?(?P<symbol>[$£€¥₹₩])\s?(?P<n>{NUMBER})"
        rf"(?:\s?[-–~]\s?[$£€¥₹₩]?(?P<to>{NUMBER}))?"
        r"(?P<multiple>\s(?:thousand|million|billion|trillion)\b|(?:[kKMBTm]|bn)(?!\w))?",
        money,
    ),
    (
        rf"(?<![\w.])(?P<n>{NUMBER})\s(?P<code>{'|'.join(CODES)})(?!\w)",
        lambda m: f"{number(m['n'])} {CODES[m['code']]}",
    ),
    # Quantities
    (r"['’]?(?<![\w.])(?P<n>(?:1[1-9]|20)\d0|\d0)['’]?s(?!\w)", decade),
    (
        r"(?<![\w.])(?P<a>\d++)\s?(?:ft|feet)\.?\s(?P<b>\d++)\s?in(?:ches)?(?=[.,;)]|\s*$)",
        lambda m: f"{cardinal(m['a'])} feet {cardinal(m['b'])} inches",
    ),
    (
        rf"{_SIGN}(?<![\w.])(?P<n>{NUMBER})(?:\s?[-–~]\s?(?P<to>{NUMBER}))?%",
        lambda m: f"{interval(m['n'], m['to']) if m['to'] else number((m['sign'] or '') + m['n'])} percent",
    ),
    (r"(?<![\w.])(?P<a>\d++)['′](?P<b>\d\d?)[\"″]", lambda m: f"{cardinal(m['a'])} foot {cardinal(m['b'])}"),
    (
        rf"{_ARTICLE}{_SIGN}(?<![\w.])(?P<n>{NUMBER})(?:\s?[-–~]\s?(?P<to>{NUMBER}))?\s?(?P<unit>{UNIT})(?![\w/²³])",
        measure,
    ),
    (rf"(?<![\w.])(?P<n>{NUMBER})[x×](?!\w)(?!\s?\d)", lambda m: f"{number(m['n'])} times"),
    (rf"(?<![\w.])(?P<n>{INTEGER})(?:st|nd|rd|th)(?!\w)", lambda m: ordinal(m["n"])),
    (r"(?<![\w./])(?:(?P<whole>\d++)\s)?(?P<over>\d++)/(?P<under>\d++)(?![\w/])", fraction),
    (rf"(?<![\w./])(?P<whole>\d++)?\s?(?P<sign>[{''.join(FRACTIONS)}])", plain_fraction),
    (r"\b(?P<name>" + NUMBERED + r")\s(?P<n>\d{3,4})(?![\w,.]*\d)", lambda m: f"{m['name']} {paired(m['n'])}"),
    (r"(?<![\w.])(?P<n>\d{3,4})(?P<p>[pP])(?!\w)", lambda m: f"{paired(m['n'])} {m['p']}"),
    (r"(?<!\w)(?:(?=[a-z]*+[A-Z])[A-Za-z]++-|[A-Za-z]++)\d++(?:\.\d++)?+[A-Za-z]*+(?!\w)", lambda m: coded(m[0])),
    (
        r"(?<![\w.])(?P<a>\d++)[xX×](?P<b>\d++)(?!\w)",
        lambda m: f"{paired(m['a'])} by {paired(m['b'])}",
    ),
    (r"(?<![\w.])(?=[A-Za-z]*+\d)(?=\d*+[A-Za-z])[A-Za-z0-9]++(?!\w)", lambda m: coded(m[0])),
    (
        rf"(?<![\w.])(?P<a>{NUMBER})(?:[-–~]|\s[–~]\s)(?P<b>{NUMBER})(?![\w-])",
        lambda m: interval(m["a"], m["b"]),
    ),
    # Sums
    (r"(?:(?<=[\d)%²³])|(?<=\b[A-Za-z]))\s?[+]\s?(?=[-−]?[\w(])", lambda m: " plus "),
    (r"(?<=[\w)%])\s?(?P<s>[=×÷≈≤≥≠])\s?(?=[-−]?[\w(])", lambda m: f" {SYMBOLS[m['s']]} "),
    (r"(?<=[\d)])\s?(?P<s>\*)\s?(?=[\d(])|(?<=\d)\s(?P<t>[x<>/])\s(?=\d)", lambda m: f" {SYMBOLS[m['s'] or m['t']]} "),
    (r"(?<=[\d)])\s?[-−]\s?(?=[\d(][^\n=]{0,40}=)", lambda m: " minus "),
    (r"(?<=\d)(?:\s-\s|[-–])(?=\d)", lambda m: " to "),
    (r"(?<=\d)/(?=\d)", lambda m: " out of "),
    (r"(?<=[\w)])\^(?=[\w(])", lambda m: " to the power of "),
    (r"±\s?(?=\d)", lambda m: "plus or minus "),
    (r"[~≈]\s?(?=\d)", lambda m: "about "),
    (r"(?<=\d)\+(?!\w)", lambda m: " plus"),
    # Words
    (
        r"\b(?P<name>" + RULERS + r")\s(?P<n>(?=[IVX]{2})[IVX]+|V|X)(?!\w)",
        lambda m: f"{m['name']} the {ordinal(str(roman(m['n'])))}",
    ),
    (
        r"\b(?P<name>" + PARTS + r")\s(?P<n>(?=[IVXL]{2})[IVXL]+|V|X|(?<=World War )I|(?<=Chapter )I|(?<=Act )I)(?!\w)",
        lambda m: f"{m['name']} {cardinal(str(roman(m['n'])))}",
    ),
    (
        rf"\b(?P<name>(?!(?:{NO_STREET})\b)[A-Z][a-z]+|\d+(?:st|nd|rd|th))\s(?P<a>St|Ave|Rd|Blvd)\.(?=(?P<end>\s*$|\s+[A-Z]))?",
        lambda m: abbreviated_end(f"{m['name']} {STREETS[m['a']]}", m),
    ),
    (
        r"(?<![\w.])(?P<a>" + "|".join(sorted(ABBREVIATIONS, key=len, reverse=True)) + r")\.\s?(?=[A-Z]|and\s)",
        lambda m: ABBREVIATIONS[m["a"]] + " ",
    ),
    (
        r"(?<![\w.])(?P<a>" + "|".join(sorted(COUNTED, key=len, reverse=True)) + r")\.\s?(?=\d)",
        lambda m: COUNTED[m["a"]] + " ",
    ),
    (r"(?<![\w.])(?P<a>[Ee]\.g|[Ii]\.e|vs|approx|a\.k\.a)\.", lambda m: cased(m["a"])),
    (r"(?<![\w.])etc\.(?=(?P<end>\s*$|\s+[A-Z]|\s*\n))?", lambda m: abbreviated_end("et cetera", m)),
    (r"(?<=\w)\s?&\s?(?=\w)", lambda m: " and "),
    (r"(?<![\w#])#(?=\d)", lambda m: "number "),
    (r"(?<![\w#&])#(?=[A-Za-z])", lambda m: "hashtag "),
    (r"(?<!\w)@(?=[A-Za-z])", lambda m: "at "),
    (r"(?<!\w)(?P<a>[CF])#(?!\w)", lambda m: m["a"] + " sharp"),
    (r"(?<!\w)(?P<a>[A-Z]|g)\+\+", lambda m: m["a"] + " plus plus"),
    (r"(?<=[A-Za-z\d])(?P<a>[²³])", lambda m: " squared" if m["a"] == "²" else " cubed"),
    (r"©\s?", lambda m: "copyright "),
    # Numbers
    (
        rf"(?<![\w.,-])(?:19|20)\d\d(?![\w]|[.,]\d)(?!\s(?:{COUNTS})\b)(?!\s(?!(?:{NOT_PLURAL})\b)[a-z]+s\b)",
        lambda m: year(m[0]),
    ),
    (
        r"\b(?P<before>[Ii]n|[Ss]ince|[Bb]y|[Uu]ntil|[Ff]rom|[Yy]ear|[Bb]efore|[Aa]fter|of|early|late|around|c\.|est\.)"
        r"\s(?P<y>1[1-8]\d\d)(?![\w]|[.,]\d|\s[a-z]+s\b)",
        lambda m: f"{m['before']} {year(m['y'])}",
    ),
    (rf"(?<![\w)\].])[-−](?P<n>{NUMBER})", lambda m: "minus " + number(m["n"])),
    (r"(?<![\w.])\.\d++", lambda m: number(m[0])),
    (NUMBER, lambda m: number(m[0])),
]


@cache
def reader() -> Reader:
    return Reader(RULES)
