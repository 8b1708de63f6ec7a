"""The smart-device command grammar of the synthetic corpus: what the speakers say.

A context-free grammar over about 300 words. It mixes what a language model can guess (rooms, devices, polite
phrases) with what it cannot (names that sound alike, numbers, times, free lists of words), so that a
recogniser has to listen. Numbers are spelled out: what is spoken is exactly what is transcribed.

Every sentence belongs to one part for good: `part_of` decides by a hash of its words. No two parts can
therefore share a sentence, whatever the seed, the scale or the number of sentences asked for.
"""

import hashlib
import re
from typing import Dict, List, Sequence, Set, Tuple

import numpy as np

# A line opens a rule, an indented one goes on with it. Alternatives are separated by `|` (a leading `3*`
# counts an alternative three times), `<name>` refers to a rule and `~` is nothing.
RULES = """
sentence: 5* <command> | 2* <ask> <command> | 2* <command> <please> | 3* <short> and <short> | 3* <question>
ask: please | could you | can you | i want you to
please: please | now
command: 2* <short> | <light> | <heat> | <timer> | <alarm> | <phone> | <message> | <remind> | <shopping>
  | <music> | <travel> | <diary> | <note>
question: <weather> | <distance> | <sum> | <left> | <code>
short: turn <onoff> the <place> <device> | <openclose> the <place> <opening> | call <name> <where>
  | play some <genre> <dayword> | set a timer for <number> <unit> | set the <place> <device> to <number>
  | add <item> and <item> to the list | tell <name> to call <name> | turn the <device> <updown> by <number>
  | ask <name> for the <colour> <thing>
light: dim the <colour> <lamp> in the <place> to <number> percent
  | turn <onoff> the <lamp> in the <place> and the <place> | make the <place> <lamp> <colour> <dayword>
  | turn <onoff> the <place> <lamp> at <time>
heat: set the <place> heater to <teen> degrees <dayword>
  | make the <place> <number> degrees warmer at <time> | keep the <place> between <teen> and <tens> degrees
timer: set a timer for <number> <unit> and <number> seconds | start a <number> minute timer for the <item>
  | stop the <item> timer after <number> <unit>
alarm: wake me at <time> <day> | set an alarm for <time> on <weekday> | move the <time> alarm to <time>
  | stop every alarm before <time> on <weekday> and <weekday>
phone: call <name> <where> at <time> | dial <digits> <digits> | call <name> or <name> <where>
  | call <digits> <digit> <dayword>
message: tell <name> and <name> that i am <number> minutes late
  | send <name> a message from <name> at <time> | ask <name> if <name> can <task> <dayword>
  | tell <name> to meet <name> in <city> on <weekday>
remind: remind <name> to <task> <dayword> | remind me to <task> on <weekday> at <time>
  | remind me and <name> to <task> in <number> <unit> | remind <name> about the <colour> <thing> at <time>
shopping: add <number> <pack> of <item> and some <item> to the list
  | take the <item> and <item> off the list | buy <number> <pack> of <item> at the shop
  | buy <item> <item> and <item> at the market
music: play the <ordinal> song by <name> in the <place> | play <genre> and <genre> in the <place>
  | skip the next <number> songs and play some <genre> | turn the volume in the <place> <updown> to <number>
weather: what is the weather in <city> <dayword> | will it <rain> in <city> or <city> on <weekday>
  | how <hotcold> is it in <city> at <time> | will it <rain> in <city> on the <ordinal> of <month>
distance: when is the next <train> from <city> to <city> | how many miles is it from <city> to <city>
travel: book a <seat> for <number> people in <city> on the <ordinal> of <month>
  | find a <train> to <city> after <time> on <weekday>
sum: what is <number> <plus> <number> | what is <number> <plus> <number> <plus> <number>
left: how many <unit> are left on the <item> timer | how <hotcold> is it in the <place> and the <place>
code: the code for the <place> <opening> is <digits> <digit> | the number of <name> is <digits> <digits>
  | the <colour> <thing> of <name> has the number <digits>
diary: put <event> with <name> on <weekday> at <time> | move <event> with <name> to the <ordinal> of <month>
  | cancel <event> on the <ordinal> of <month> and tell <name>
  | cancel <event> with <name> and <name> on <weekday>
note: write down <word> <word> <word> <word> | write down <word> <word> <word> <word> <word> <word>
  | find <word> <word> or <word> | send <name> the words <word> <word> <word>
word: <name> | <item> | <colour> | <city> | <thing> | <digit> | <number> | <place> | <month> | <weekday>
onoff: on | off
openclose: open | close | lock | unlock | check
updown: up | down
hotcold: hot | cold | warm | wet
rain: rain | snow
plus: plus | minus | times
where: ~ | at work | at home | in the office | in <city>
day: ~ | today | tomorrow | tonight | on <weekday>
dayword: <day> | this morning | this evening | on <weekday> <daytime> | at <time>
daytime: morning | afternoon | evening | night
place: kitchen | bedroom | bathroom | hall | office | garage | garden | attic | cellar | <side> bedroom
  | <side> hall
side: front | back | upper | lower
device: light | lights | lamp | fan | heater | television | radio | oven | speaker | alarm
lamp: light | lights | lamp | lamps
opening: door | doors | window | windows | gate | blinds
thing: book | bag | box | coat | hat | keys | phone | car | cup
colour: red | blue | green | white | black | pink | brown | grey
unit: seconds | minutes | hours | days
pack: bottles | packs | boxes | bags | cups
item: milk | bread | cheese | eggs | rice | tea | coffee | sugar | salt | apples | onions | beans | beef
  | soap | soup | peas
genre: jazz | rock | pop | blues | music | news
seat: table | room | car
train: train | bus | plane
event: lunch | dinner | the meeting | the party | a game
task: feed the cat | feed the dog | wash the <thing> | wash the dog | call the bank | call the doctor
  | clean the <place> | lock the <place> <opening> | buy <item> | bring the <thing>
name: anne | anna | dan | jan | tim | jim | kim | tom | john | joan | jane | kate | nate | jake | ben | ken
  | jen | mary | harry | barry | bill | jill | paul | rose
city: london | paris | berlin | rome | oslo | dublin | boston | austin | dallas | madrid | athens
weekday: monday | tuesday | wednesday | thursday | friday | saturday | sunday
month: january | february | march | april | may | june | july | august | september | october | november
  | december
hour: one | two | three | four | five | six | seven | eight | nine | ten | eleven | twelve
time: <hour> o'clock | half past <hour> | quarter past <hour> | quarter to <hour> | <hour> <teen>
  | <hour> <tens> | ten past <hour> | twenty to <hour> | noon | midnight | <hour> <tens> <positive>
digit: zero | one | two | three | four | five | six | seven | eight | nine
digits: <digit> <digit> <digit> | <digit> <digit> <digit> <digit>
positive: one | two | three | four | five | six | seven | eight | nine
teen: ten | eleven | twelve | thirteen | fourteen | fifteen | sixteen | seventeen | eighteen | nineteen
tens: twenty | thirty | forty | fifty
manytens: <tens> | <tens> | sixty | seventy | eighty | ninety
number: 2* <positive> | 3* <teen> | 2* <manytens> | 3* <manytens> <positive> | <positive> hundred
  | <positive> hundred and <teen>
ordinal: first | second | third | fourth | fifth | tenth | twentieth | thirtieth | twenty first
  | twenty second | twenty third | twenty fourth | twenty fifth
"""

_START = "sentence"


def _parsed(text: str) -> Dict[str, List[Tuple[str, ...]]]:
    """Rules as lists of alternatives, each a tuple of words and `<name>` references."""
    parsed: Dict[str, List[Tuple[str, ...]]] = {}
    for rule in re.split(r"\n(?! )", text.strip()):
        name, body = rule.split(":", 1)
        parsed[name] = []
        for alternative in body.split("|"):
            weight, items = re.fullmatch(r"\s*(?:(\d+)\*)?(.+?)\s*", alternative).groups()
            parsed[name].extend([tuple(item for item in items.split() if item != "~")] * int(weight or 1))
    return parsed


_GRAMMAR = _parsed(RULES)


def vocabulary() -> List[str]:
    """Every word the grammar can produce, sorted, lower case."""
    words: Set[str] = set()
    for alternatives in _GRAMMAR.values():
        for items in alternatives:
            words.update(item for item in items if not item.startswith("<"))
    return sorted(words)


def random_sentence(rng: np.random.Generator) -> str:
    """One sentence of the grammar: lower-case words separated by single spaces."""
    words: List[str] = []
    stack = [f"<{_START}>"]
    while stack:
        item = stack.pop()
        if item.startswith("<"):
            alternatives = _GRAMMAR[item[1:-1]]
            stack.extend(reversed(alternatives[rng.integers(len(alternatives))]))
        else:
            words.append(item)
    return " ".join(words)


def part_of(sentence: str, shares: Sequence[Tuple[str, int]]) -> str:
    """The part that owns `sentence`: a hash of its words picks one of `shares` (part, weight)."""
    point = int.from_bytes(hashlib.sha256(sentence.encode()).digest()[:8], "big") % sum(w for _, w in shares)
    for part, weight in shares:
        if point < weight:
            return part
        point -= weight
    raise AssertionError("unreachable: the point lies below the sum of the weights")


def draw_sentences(
    rng: np.random.Generator, part: str, shares: Sequence[Tuple[str, int]], count: int, words: Tuple[int, int]
) -> List[str]:
    """`count` different sentences owned by `part`, each of `words` = (fewest, most) words."""
    drawn: Dict[str, None] = {}  # a dict keeps the order of drawing
    for _ in range(1000 * count + 1000):
        if len(drawn) == count:
            return list(drawn)
        sentence = random_sentence(rng)
        if words[0] <= sentence.count(" ") + 1 <= words[1] and part_of(sentence, shares) == part:
            drawn[sentence] = None
    raise ValueError(f"the grammar gives only {len(drawn)} of {count} sentences of {words} words for {part}")
