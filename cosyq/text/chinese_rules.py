"""Where Mandarin text is not plain words: the patterns of its spans, each with its reading, first match wins."""

from __future__ import annotations

import re
from functools import cache

from cosyq.text.chinese import (
    DIGITS,
    UNIT,
    address,
    between,
    cardinal,
    clock,
    coded,
    components,
    counted,
    date,
    fraction,
    measure,
    moment,
    money,
    named,
    number,
    numbers,
    percent,
    spelled,
    year,
)
from cosyq.text.engine import say
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

# A single 2 is 两 before these, when they count; before any other word it is 二.
COUNTED = (
    r"[个個位名人家条條只隻本张張层層件杯碗瓶盒袋包箱台辆輛架艘把支枝根块塊片颗顆粒滴座间間所套双雙对對群批份部篇首句段"
    r"页頁步遍趟场場顿頓口声聲次回下倍天年周岁歲秒点點毛斤里尺寸吨噸亩畝种種样樣类類项項款门門国國地者侧侧边邊头頭匹棵"
    r"朵株盘盤桌道笔筆题題轮輪局胜勝大半百千万萬亿億成方端极極分公克升米元]"
    r"|小[时時]|星期|礼拜|美元|欧元|英镑|港元|日元|平方|立方|英[里尺寸]|毫[米升克]|厘米|千[米克瓦]|摄氏度|度(?!假)|起|架"
)
NOT_COUNTED = r"年[级級生]|次[元方]|等[奖獎]|分之|点五|號|元[论論]|级|月份|下标"
SCALE = "[百千]?[万萬亿億]|[百千]"
SYMBOLS = {
    "+": "加",
    "-": "减",
    "−": "减",
    "×": "乘",
    "x": "乘",
    "*": "乘",
    "÷": "除以",
    "/": "除以",
    "=": "等于",
    "<": "小于",
    ">": "大于",
    "≤": "小于等于",
    "≥": "大于等于",
    "≈": "约等于",
    "≠": "不等于",
}
NAMED = (
    r"电话|電話|手机|手機|热线|专线|号码|號碼|编号|編號|邮编|郵編|邮政编码|QQ|qq|微信|身份证|账号|帳號|卡号|密码|密碼|验证码"
    r"|驗證碼|尾号|工号|学号|单号|订单|拨打|撥打|拨|呼叫|区号|代码|车牌"
)
ROOM = r"室|房|教室|病房|包厢|路公交|路车|路(?=[、，。！？]|$)|次列车|次航班|航班|号房|宿舍"

_PHONE = (
    r"(?<![\w.+-])\+\d{1,3}(?:[- ]?\(?\d{1,11}\)?){1,4}(?![\w-])"
    r"|(?<![\w.-])\(?0\d{2,3}\)?[- ]?\d{7,8}(?![\w-])"
    r"|(?<![\w.-])1[3-9]\d(?:\d{8}|[- ]\d{4}[- ]\d{4})(?![\w-])"
    r"|(?<![\w.-])\d{3}-\d{4}(?![\w-])"
    r"|(?<![\w.-])(?!\d{4}-\d\d?-\d\d?(?!\d))\d++(?:-\d++){2,}+(?![\w-])"
    r"|(?<![\w.-])\d{17}[\dXx](?!\w)"
)
_TIME = r"(?:2[0-4]|1\d|0?\d)[:：][0-5]\d(?:[:：][0-5]\d)?"
_TO = r"\s?[-–—~～]{1,2}\s?"
_DATE = r"(?:1\d|20)\d\d(?P<s>[-/.])(?:1[0-2]|0?[1-9])[-/.](?:3[01]|[12]\d|0?[1-9])"


def _topic(match: re.Match[str]) -> str:
    return reader().read(match["topic"])


RULES: list[Rule] = [
    (TAG, lambda m: m[0]),
    (PICTURE, lambda m: ""),
    (URL, lambda m: address(m[0])),
    (EMAIL, lambda m: address(m[0])),
    (BARE_URL, lambda m: address(m[0])),
    (IP + r"(?::\d++)?", lambda m: "".join({".": "点", ":": "冒号"}.get(c) or spelled(c) for c in m[0])),
    # Dates
    (rf"(?<![\w.]){_DATE}(?![\w/-])", lambda m: date(m[0])),
    (r"(?<![\w.])(?P<n>\d\d)(?=年\d{1,2}月)", year),
    (r"(?<![\w.])(?P<n>\d{2}0)0(?=年(?:的?历史|前|后|来|间|以前|以后|以来|文明|之久))", lambda m: counted(m[0])),
    (r"(?<![\w.])(?P<n>[12]\d{3})(?=年)", year),
    (r"(?<![\w.])(?P<n>[6-9][05]|[01][05])(?=后(?!天|面|方|再|来))", year),
    # Numbers that are names
    (_PHONE, lambda m: numbers(m[0])),
    (
        rf"(?P<name>{NAMED})(?P<link>(?:号码|号|码|是|为|：|:|\s){{0,3}})(?P<n>\d{{3,}}+(?:[或、和]\d{{3,}}+)*+)(?![\w,.-]*\d)",
        lambda m: m["name"] + m["link"] + re.sub(r"\d+", lambda n: named(n[0]), m["n"]),
    ),
    (rf"(?<![\w.,])(?P<n>\d{{3,4}})(?={ROOM})", lambda m: named(m["n"])),
    (
        r"(?<![\w.,])(?P<n>11[0249]|12[02]|12306|12315|12345|100(?:86|10|00)|95\d{3})(?=热线|报警|急救|火警|电话|服务)",
        lambda m: named(m["n"]),
    ),
    (r"(?<![\w.,])(?P<n>11[029]|12[02])(?=[，。！？、；\s]|或|和|$)", lambda m: named(m["n"])),
    (
        r"(?<![\w.,])(?P<n>985|211|996|315|618|911|747|737|777|787|320)(?=[，。！？、；\s/]|高校|大学|院校|工程|晚会|事件|客机|飞机|$)",
        lambda m: named(m["n"]),
    ),
    (r"双(?P<n>11|12)(?!\d)", lambda m: "双" + "十" + DIGITS[int(m["n"][1])]),
    (r"9[·.]11(?=事件|恐怖)|911(?=事件|恐怖)", lambda m: "九幺幺"),
    (r"(?<![\w.])7\s?[×xX*]\s?24(?=小时)", lambda m: "七乘二十四"),
    # Codes, versions
    (r"(?<![\w.])(?P<v>[vV])(?P<n>\d++(?:\.\d++)*+)(?!\w)", lambda m: m["v"] + components(m["n"])),
    (r"(?<![\w.])\d++(?:\.\d++){2,}+", lambda m: components(m[0])),
    (FILE, lambda m: address(m[0])),
    # Clock times, scores
    (
        r"(?P<name>比分|以|比)(?P<link>[是为：:\s]{0,2})(?P<a>\d++)[:：](?P<b>\d++)(?![\w:：])",
        lambda m: f"{m['name']}{m['link']}{cardinal(m['a'])}比{cardinal(m['b'])}",
    ),
    (
        rf"(?<![\w:：.])(?P<t>{_TIME})\s?(?P<noon>[AaPp])\.?[Mm]\.?(?!\w)",
        lambda m: ("上午" if m["noon"] in "aA" else "下午") + moment(m["t"]),
    ),
    (rf"(?<![\w:：.])(?P<a>{_TIME})(?:{_TO}(?P<b>{_TIME}))?(?![\w:：])", clock),
    (r"(?<![\w:：.])(?P<a>\d++)\s?[:：]\s?(?P<b>\d++)(?![\w:：])", lambda m: f"{cardinal(m['a'])}比{cardinal(m['b'])}"),
    # Money, shares, measures
    (
        rf"(?P<sign>(?<!\w)[-−])?(?<!\w)(?P<symbol>HK\$|[$£€¥￥₹₩])\s?(?P<n>{NUMBER})(?:{_TO}[$£€¥￥]?(?P<to>{NUMBER}))?(?P<scale>{SCALE})?",
        money,
    ),
    (
        rf"(?P<sign>(?<![\w%])[-−±])?(?<![\w.])(?P<n>{NUMBER})(?:%?{_TO}(?P<to>{NUMBER}))?\s?(?P<unit>[%‰])",
        percent,
    ),
    (
        rf"(?P<sign>(?<![\w%])[-−])?(?<![\w.])(?P<n>{NUMBER})(?:{_TO}(?P<to>{NUMBER}))?\s?(?P<unit>{UNIT})(?![\w/²³])",
        measure,
    ),
    # Fractions, ranges
    (r"(?<![\w./])(?P<over>\d++)/(?P<under>\d++)(?![\w/])", fraction),
    (
        rf"(?<![\w.])(?P<over>\d++)?\s?(?P<sign>[{''.join(FRACTIONS)}])",
        lambda m: (cardinal(m["over"]) + "又" if m["over"] else "") + say("zh", FRACTIONS[m["sign"]]),
    ),
    (
        r"(?<![\w.])(?P<over>\d++)分之(?P<under>\d++)(?!\w)",
        lambda m: f"{cardinal(m['over'])}分之{cardinal(m['under'])}",
    ),
    (
        rf"(?<![\w.-])(?P<a>[12]\d{{3}})(?P<inner>年)?{_TO}(?P<b>[12]\d{{3}})(?P<year>(?=年|学年))",
        lambda m: f"{spelled(m['a'])}{m['inner'] or ''}到{spelled(m['b'])}",
    ),
    (
        rf"(?<![\w.-])(?P<a>(?:19|20)\d\d){_TO}(?P<b>(?:19|20)\d\d)(?![\w-]|[万亿元个人])",
        lambda m: f"{spelled(m['a'])}到{spelled(m['b'])}",
    ),
    (
        rf"(?<![\w.-])(?P<a>{NUMBER})(?P<unit>[年月日号天岁点时元度万亿]|小时|分钟)?{_TO}(?P<b>{NUMBER})(?![\w-]|\s?=)",
        lambda m: between(m),
    ),
    (r"(?<=\d[年月日号天岁点时分元度万亿周])\s?[-–~～—]{1,2}\s?(?=\d)", lambda m: "到"),
    # Model names and other codes
    (
        r"(?<![\w.-])(?P<name>[GDCZTKYS])(?P<n>\d{1,4})(?=次|号?列车|高铁|动车)",
        lambda m: m["name"] + named(m["n"]),
    ),
    (r"(?<!\w)No\.\s?(?=\d)", lambda m: "第"),
    (r"(?<!\w)(?:(?=[a-z]*+[A-Z])[A-Za-z]++-|[A-Za-z]++)\d++(?:\.\d++)?+[A-Za-z]*+(?!\w)", lambda m: coded(m[0])),
    (
        r"(?<![\w.])(?P<a>\d++)[xX×*](?P<b>\d++)(?!\w)",
        lambda m: f"{cardinal(m['a'])}乘{cardinal(m['b'])}",
    ),
    (r"(?<=[\w)])\^(?P<n>\d++)", lambda m: f"的{cardinal(m['n'])}次方"),
    (r"(?<![\w.])(?=[A-Za-z]*+\d)(?=\d*+[A-Za-z])[A-Za-z0-9]++(?!\w)", lambda m: coded(m[0])),
    # Sums
    (r"(?<=[\w)%])\s?(?P<s>[+×÷=≈≤≥≠])\s?(?=[-−]?[\w(])", lambda m: SYMBOLS[m["s"]]),
    (r"(?<=[\d)])\s?(?P<s>[*<>])\s?(?=[\d(])|(?<=\d)\s(?P<t>[x/])\s(?=\d)", lambda m: SYMBOLS[m["s"] or m["t"]]),
    (r"(?<=[A-Za-z]) ?(?P<s>[<>]) ?(?=\d)", lambda m: SYMBOLS[m["s"]]),
    (r"(?<=[\d)])\s?[-−]\s?(?=\d)", lambda m: "减"),
    (r"±\s?(?=\d)", lambda m: "正负"),
    (r"[~～≈]\s?(?=\d)", lambda m: "约"),
    (r"(?<=\d)\+(?!\w)", lambda m: "加"),
    # Words
    (r"#(?P<topic>[^#\s]{1,40})#", _topic),
    (r"(?<![\w#&])#(?=[^\W\d])", lambda m: "话题"),
    (r"(?<![\w#])#(?=\d)", lambda m: "第"),
    (r"(?<!\w)@(?=\w|[\u4e00-\u9fff])", lambda m: "艾特"),
    (r"(?<!\w)(?P<a>[A-Z])\+\+", lambda m: m["a"] + "加加"),
    (r"(?<!\w)(?P<a>[CF])#(?!\w)", lambda m: m["a"] + " sharp"),
    (r"(?<=[\w\u4e00-\u9fff])\s?&\s?(?=[\w\u4e00-\u9fff])", lambda m: "和"),
    (r"(?<=[A-Za-z\d])(?P<a>[²³])", lambda m: "的平方" if m["a"] == "²" else "的立方"),
    # Numbers
    (rf"第(?P<n>{INTEGER})", lambda m: "第" + cardinal(m["n"])),
    (r"(?<=月)(?P<n>\d\d?)(?=[日号號])", lambda m: cardinal(m["n"])),
    (rf"(?<![\w.,=])2(?=(?!{NOT_COUNTED})(?:{COUNTED}))", lambda m: "两"),
    (rf"(?<![\w)%])[-−](?P<n>{NUMBER})", lambda m: "负" + number(m["n"])),
    (NUMBER, lambda m: number(m[0])),
]


@cache
def reader() -> Reader:
    return Reader(RULES)
