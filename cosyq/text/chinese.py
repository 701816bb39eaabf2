"""How Mandarin says what is written in digits and symbols.

wetext reads whole numbers, clock times, simple fractions and most units. Read here is what it gets wrong or what
differs by context: 两 and 二, numbers that are names (110, 302室, K123次), codes, versions, ranges, percentages, money,
addresses. Digits of names are said with 幺 for one; those of decimals, years and versions with 一.
"""

from __future__ import annotations

import re

from cosyq.text.engine import say
from cosyq.text.spans import spell_address

DIGITS = "零一二三四五六七八九"
_LONGEST = 12  # digits of a number that wetext says as one; a longer one is spelled

_CURRENCY = {"$": "美元", "£": "英镑", "€": "欧元", "¥": "元", "￥": "元", "₩": "韩元", "₹": "卢比", "HK$": "港元"}

_KNOWN = (
    "km/h m/s km² km2 m² m2 cm² cm2 m³ m3 cm³ cm3 km cm mm μm kg mg lbs lb oz ft yd mph °C °F ℃ ° kW ml ms min kcal rpm"
)
_KNOWN += " m s h L"
_UNITS = {
    "㎡": "平方米",
    "㎏": "千克",
    "㎞": "公里",
    "g": "克",
    "mL": "毫升",
    "kWh": "千瓦时",
    "mAh": "毫安时",
    "kHz": "千赫兹",
    "MHz": "兆赫兹",
    "GHz": "吉赫兹",
    "Hz": "赫兹",
    "dB": "分贝",
    "W": "瓦",
    "V": "伏",
    "nm": "纳米",
    "hPa": "百帕",
    "kPa": "千帕",
}
UNIT = "|".join(re.escape(unit) for unit in sorted({*_KNOWN.split(), *_UNITS}, key=len, reverse=True))

_ADDRESS = {
    ".": "点",
    "/": "斜杠",
    "-": "杠",
    "_": "下划线",
    "@": "艾特",
    ":": "冒号",
    "?": "问号",
    "=": "等于",
    "&": "和",
    "#": "井号",
    "%": "百分号",
    "+": "加号",
    "~": "波浪号",
}


def cardinal(digits: str) -> str:
    """'1,234' -> '一千二百三十四'; a code, such as '007', digit by digit."""
    digits = digits.replace(",", "")
    if len(digits) > _LONGEST or (len(digits) > 1 and digits[0] == "0"):
        return named(digits)
    return "二" if digits == "2" else say("zh", digits + "元").removesuffix("元")


def spelled(digits: str) -> str:
    """'101' -> '一零一'."""
    return "".join(DIGITS[int(digit)] for digit in digits)


def named(digits: str) -> str:
    """'101' -> '幺零幺', as in numbers that are names."""
    return spelled(digits).replace("一", "幺")


def number(text: str) -> str:
    """'-12.50' -> '负十二点五零'."""
    sign, body = ("负", text[1:]) if text[0] in "-−" else ("", text)
    whole, point, rest = body.partition(".")
    return sign + (cardinal(whole) if whole else "") + (f"点{spelled(rest)}" if point else "")


def counted(text: str) -> str:
    """A number before what it counts: a single 2 is 两."""
    return "两" if text == "2" else number(text)


def coded(text: str) -> str:
    """'GPT-4o' -> 'GPT四o': the letters stay, up to two digits are a number, more are a name."""
    parts = re.findall(r"\d+(?:\.\d+)?|[A-Za-z]+", text)
    return "".join(_short(part) if part[0].isdigit() else part for part in parts)


def _short(digits: str) -> str:
    return named(digits) if digits.isdigit() and len(digits) > 2 else number(digits)


def components(text: str) -> str:
    """'3.12' -> '三点一二', as versions are said."""
    return "点".join(cardinal(part) if len(part) == 1 else spelled(part) for part in text.split("."))


def percent(match: re.Match[str]) -> str:
    base = {"%": "百分之", "‰": "千分之"}[match["unit"]]

    def share(text: str) -> str:
        return base + ("百" if base == "百分之" and text == "100" else number(text))

    sign = {"-": "负", "−": "负", "±": "正负"}.get(match["sign"] or "", "")
    return sign + share(match["n"]) + ("到" + share(match["to"]) if match["to"] else "")


def measure(match: re.Match[str]) -> str:
    sign, unit = "负" if match["sign"] else "", match["unit"]
    amount = match["to"] or match["n"]
    if unit in _UNITS:
        last = counted(amount) + _UNITS[unit]
    elif "/" in unit:  # 每小时一百公里
        last = say("zh", "3" + unit).replace("三", counted(amount))
    else:
        last = counted(amount) + say("zh", "3" + unit).removeprefix("三")
    return sign + (counted(match["n"]) + "到" if match["to"] else "") + last


def money(match: re.Match[str]) -> str:
    unit = _CURRENCY[match["symbol"]]
    scale = match["scale"] or ""

    def amount(text: str) -> str:
        return counted(re.sub(r"\.?0+$", "", text) if "." in text else text)

    words = amount(match["n"]) + ("到" + amount(match["to"]) if match["to"] else "")
    return ("负" if match["sign"] else "") + words + scale + unit


def year(match: re.Match[str]) -> str:
    return spelled(match["n"])


def fraction(match: re.Match[str]) -> str:
    over, under = match["over"], match["under"]
    if max(len(over), len(under)) <= 2 and int(under) <= int(over) <= 12 and int(under):
        return f"{cardinal(over)}月{cardinal(under)}日"
    return f"{cardinal(under)}分之{cardinal(over)}"


def clock(match: re.Match[str]) -> str:
    """'9:05' -> '九点零五分'."""
    return moment(match["a"]) + ("到" + moment(match["b"]) if match["b"] else "")


def moment(text: str) -> str:
    hours, rest = re.split("[:：]", text, maxsplit=1)
    return say("zh", f"{int(hours):02}:{rest.replace('：', ':')}")


def numbers(text: str) -> str:
    """Telephone and other grouped numbers: digit by digit."""
    plus = "加" if text.startswith("+") else ""
    return plus + "，".join(named(group) for group in re.findall(r"\d+", text))


def address(text: str) -> str:
    return spell_address(text, _ADDRESS, _short, "")


def date(text: str) -> str:
    years, month, day = re.split("[-/.]", text)
    return f"{spelled(years)}年{cardinal(str(int(month)))}月{cardinal(str(int(day)))}日"


def between(match: re.Match[str]) -> str:
    return f"{number(match['a'])}{match['unit'] or ''}到{number(match['b'])}"
