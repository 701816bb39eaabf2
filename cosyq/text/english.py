"""How English says what is written in digits and symbols.

wetext reads groups of digits, ordinals, years, durations, fractions and most units. Read here is what it gets wrong
or what differs by context: codes (GPT-4o), versions, telephone numbers, ranges, amounts of money, dates (it turns
"January 5" into "the fifth of january"), addresses, abbreviations, Roman numerals.
"""

from __future__ import annotations

import re
from functools import cache

from cosyq.text.engine import say
from cosyq.text.spans import FRACTIONS, spell_address

_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_SCALES = ["", " thousand", " million", " billion", " trillion"]
_LONGEST = 3 * len(_SCALES)  # digits of a number that is said as one; a longer one is spelled

_MONTHS = [
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
YEAR = r"(?:1[1-9]|20)\d\d"

_CURRENCY = {
    "$": ("dollar", "dollars", "cent", "cents"),
    "£": ("pound", "pounds", "penny", "pence"),
    "€": ("euro", "euros", "cent", "cents"),
    "¥": ("yen", "yen", "", ""),
    "₹": ("rupee", "rupees", "paisa", "paise"),
    "₩": ("won", "won", "", ""),
}
_COUNTRY = {"US": "US ", "A": "Australian ", "AU": "Australian ", "C": "Canadian ", "CA": "Canadian "}
_COUNTRY |= {"HK": "Hong Kong ", "NZ": "New Zealand ", "S": "Singapore ", "": ""}
_MULTIPLE = {"k": " thousand", "K": " thousand", "M": " million", "B": " billion", "T": " trillion"}
_MULTIPLE |= {"m": " million", "bn": " billion"}

# Units that wetext reads (but for the number before them), and those that it does not know or takes for another.
_KNOWN = "km/h m/s² km² km2 m² m2 cm² cm2 m³ m3 cm³ cm3 km cm mm kg mg lbs lb oz ft yd mi mph °C °F ℃ MHz GHz Hz"
_KNOWN += " KB MB GB TB Mbps kW ml ms min rpm"
_UNITS = {
    "m/s": ("meter per second", "meters per second"),
    "MB/s": ("megabyte per second", "megabytes per second"),
    "GB/s": ("gigabyte per second", "gigabytes per second"),
    "kWh": ("kilowatt hour", "kilowatt hours"),
    "mAh": ("milliamp hour", "milliamp hours"),
    "kHz": ("kilohertz", "kilohertz"),
    "kB": ("kilobyte", "kilobytes"),
    "kPa": ("kilopascal", "kilopascals"),
    "Gbps": ("gigabit per second", "gigabits per second"),
    "kbps": ("kilobit per second", "kilobits per second"),
    "kph": ("kilometer per hour", "kilometers per hour"),
    "kcal": ("kilocalorie", "kilocalories"),
    "mA": ("milliamp", "milliamps"),
    "fps": ("frame per second", "frames per second"),
    "sq ft": ("square foot", "square feet"),
    "dB": ("decibel", "decibels"),
    "mL": ("milliliter", "milliliters"),
    "μm": ("micrometer", "micrometers"),
    "hrs": ("hour", "hours"),
    "hr": ("hour", "hours"),
    "nm": ("nanometer", "nanometers"),
    "px": ("pixel", "pixels"),
    "W": ("watt", "watts"),
    "V": ("volt", "volts"),
    "L": ("liter", "liters"),
    "m": ("meter", "meters"),
    "g": ("gram", "grams"),
    "h": ("hour", "hours"),
    "s": ("second", "seconds"),
    "°": ("degree", "degrees"),
    "%": ("percent", "percent"),
    "‰": ("per mille", "per mille"),
}
UNIT = "|".join(re.escape(unit) for unit in sorted({*_KNOWN.split(), *_UNITS}, key=len, reverse=True))

_PLAIN = {"e.g": "for example", "i.e": "that is", "vs": "versus", "approx": "approximately", "a.k.a": "also known as"}
_ADDRESS = {
    ".": "dot",
    "/": "slash",
    "-": "dash",
    "_": "underscore",
    "@": "at",
    ":": "colon",
    "?": "question mark",
    "=": "equals",
    "&": "and",
    "#": "hash",
    "%": "percent",
    "+": "plus",
    "~": "tilde",
}


def cardinal(digits: str) -> str:
    """'1,234' -> 'one thousand two hundred and thirty four'; a code, such as '007', digit by digit."""
    digits = digits.replace(",", "")
    if len(digits) > _LONGEST or (len(digits) > 1 and digits[0] == "0"):
        return spelled(digits)
    if int(digits) == 0:
        return "zero"
    head = len(digits) % 3
    groups = [digits[:head]] * bool(head) + [digits[i : i + 3] for i in range(head, len(digits), 3)]
    words: list[str] = []
    for group, scale in zip(groups, reversed(_SCALES[: len(groups)]), strict=True):
        if int(group):
            joint = "and " if words and not scale and int(group) < 100 else ""
            words.append(joint + say("en", str(int(group))) + scale)
    return " ".join(words)


def spelled(digits: str) -> str:
    """'404' -> 'four zero four'."""
    return " ".join(_DIGITS[int(digit)] for digit in digits)


def number(text: str) -> str:
    """'-12.50' -> 'minus twelve point five zero'."""
    sign, body = ("minus ", text[1:]) if text[0] in "-−" else ("", text)
    whole, point, rest = body.partition(".")
    words = cardinal(whole) if whole else ""
    return sign + (f"{words} point {spelled(rest)}".lstrip() if point else words)


def ordinal(digits: str) -> str:
    """'21' -> 'twenty first'."""
    digits = digits.replace(",", "")
    if len(digits) > 6:
        return cardinal(digits) + "th"
    value = int(digits)
    last = "th" if value % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(value % 10, "th")
    return say("en", f"{value}{last}") if value else "zeroth"


def year(digits: str) -> str:
    """'1905' -> 'nineteen oh five'."""
    return say("en", digits).replace(" zero ", " oh ")


def paired(digits: str) -> str:
    """'101' -> 'one oh one', '747' -> 'seven forty seven', '4090' -> 'forty ninety'."""
    head, tail = digits[:-2], digits[-2:]
    if len(digits) not in (3, 4) or tail == "00" or digits[0] == "0":
        return cardinal(digits)
    return f"{cardinal(head)} {'oh ' + cardinal(tail[1]) if tail[0] == '0' else cardinal(tail)}"


def coded(text: str) -> str:
    """'GPT-4o' -> 'GPT four o': the letters stay, up to two digits are a number, more are spelled."""
    parts = re.findall(r"\d+(?:\.\d+)?|[A-Za-z]+", text)
    return " ".join(_short(part) if part[0].isdigit() else part for part in parts)


def _short(digits: str) -> str:
    whole = digits.partition(".")[0]
    return number(digits) if len(whole) <= 2 else spelled(digits) if digits.isdigit() else number(digits)


def components(text: str) -> str:
    """'3.12' -> 'three point twelve', as versions are said."""
    return " point ".join(cardinal(part) for part in text.split("."))


def version(match: re.Match[str]) -> str:
    return ("version " if match["v"] else "") + components(match["n"])


def interval(left: str, right: str) -> str:
    if all(re.fullmatch(YEAR, part) for part in (left, right)):
        return f"{year(left)} to {year(right)}"
    return f"{number(left)} to {number(right)}"


@cache
def _unit_name(unit: str, several: bool) -> str:
    if unit in _UNITS:
        return _UNITS[unit][several]
    return say("en", f"{2 if several else 1} {unit}").removeprefix("two " if several else "one ")


def measure(match: re.Match[str]) -> str:
    one = match["article"] is not None or (match["n"] == "1" and not match["to"])
    amount = interval(match["n"], match["to"]) if match["to"] else number((match["sign"] or "") + match["n"])
    return f"{amount} {_unit_name(match['unit'], not one)}"


def money(match: re.Match[str]) -> str:
    one, several, cent, cents = _CURRENCY[match["symbol"]]
    if match["article"] is not None:
        several, cents = one, cent
    country, multiple = _COUNTRY[match["country"] or ""], match["multiple"] or ""
    minus = "minus " if match["sign"] else ""
    if match["to"]:
        return f"{minus}{number(match['n'])} to {number(match['to'])}{_multiple(multiple)} {country}{several}"
    whole, _, rest = match["n"].partition(".")
    if multiple or len(rest) > 2 or not cent:
        return f"{minus}{number(match['n'])}{_multiple(multiple)} {country}{several}"
    big, small = whole.replace(",", ""), int(rest.ljust(2, "0")) if rest else 0
    words = []
    if big.strip("0") != "" or not small:
        words.append(f"{cardinal(whole)} {country}{one if big == '1' else several}")
    if small:
        words.append(f"{cardinal(str(small))} {cent if small == 1 else cents}")
    return minus + " and ".join(words)


def _multiple(text: str) -> str:
    return _MULTIPLE.get(text.strip(), f" {text.strip()}") if text else ""


def month_day(match: re.Match[str]) -> str:
    words = f"{month(match['month'])} {ordinal(match['day'])}"
    if match["to"]:
        words += f" to {ordinal(match['to'])}"
    return words + (f", {year(match['year'])}" if match["year"] else "")


def day_month(match: re.Match[str]) -> str:
    words = f"the {ordinal(match['day'])} of {month(match['month'])}"
    return words + (f" {year(match['year'])}" if match["year"] else "")


def month(text: str) -> str:
    return next(month for month in _MONTHS if month.startswith(text[:3]))


def date(written: str, day: str, month: str, years: str) -> str:
    """A date in digits, month first as in the United States unless that cannot be; else the digits."""
    if int(month) > 12:
        day, month = month, day
    if not 1 <= int(month) <= 12 or not 1 <= int(day) <= 31:
        return " ".join(cardinal(part) for part in re.findall(r"\d+", written))
    return f"{_MONTHS[int(month) - 1]} {ordinal(day)}, {year(years)}"


def clock(match: re.Match[str]) -> str:
    """'9:05 am' -> 'nine oh five AM'; hours over 24 are a count of minutes."""
    noon = " " + match["noon"].replace(".", "").upper() if match["noon"] else ""
    if match["seconds"]:
        return say("en", match["hours"] + ":" + match["minutes"] + ":" + match["seconds"]) + noon
    if int(match["hours"]) > 24:
        return f"{cardinal(match['hours'])} {_minutes(match['minutes'])}{noon}".replace("  ", " ")
    if match["minutes"] == "00":
        return cardinal(str(int(match["hours"]))) + (noon or " o'clock")
    return f"{cardinal(str(int(match['hours'])))} {_minutes(match['minutes'])}{noon}"


def _minutes(digits: str) -> str:
    return f"oh {cardinal(digits[1])}" if digits[0] == "0" and digits != "00" else cardinal(digits)


def fraction(match: re.Match[str]) -> str:
    whole, over, under = match["whole"], match["over"], match["under"]
    if (over, under) == ("24", "7"):
        return "twenty four seven"
    if (over, under) == ("9", "11"):
        return "nine eleven"
    if (over, under) == ("50", "50"):
        return "fifty fifty"
    if not whole and under in ("10", "100"):
        return f"{cardinal(over)} out of {cardinal(under)}"
    if len(over) > 2 or len(under) > 2 or not 0 < int(over) < int(under):
        words = f"{cardinal(over)} over {cardinal(under)}"
    else:
        words = say("en", f"{int(over)}/{int(under)}")
    return f"{cardinal(whole)} and {'a half' if words == 'one half' else words}" if whole else words


def plain_fraction(match: re.Match[str]) -> str:
    words = say("en", FRACTIONS[match["sign"]])
    return f"{cardinal(match['whole'])} and {'a half' if words == 'one half' else words}" if match["whole"] else words


def decade(match: re.Match[str]) -> str:
    words = match["n"]
    said = year(words) if len(words) == 4 else cardinal(words) if int(words) else "two thousand"
    return said[:-1] + "ies" if said.endswith("y") else said + "s"


def roman(text: str) -> int:
    values = [{"I": 1, "V": 5, "X": 10, "L": 50}[letter] for letter in text]
    return sum(-a if a < b else a for a, b in zip(values, [*values[1:], 0], strict=True))


def abbreviated_end(words: str, match: re.Match[str]) -> str:
    return words + ("." if match["end"] is not None else "")


def numbers(text: str) -> str:
    """Telephone and other grouped numbers: digit by digit, a pause between the groups."""
    plus = "plus " if text.startswith("+") else ""
    return plus + ", ".join(spelled(group) for group in re.findall(r"\d+", text))


def address(text: str) -> str:
    return spell_address(text, _ADDRESS, _short, " ")


def cased(abbreviation: str) -> str:
    words = _PLAIN[abbreviation.lower()]
    return words.capitalize() if abbreviation[0].isupper() else words
