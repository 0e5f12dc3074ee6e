"""The labelled English of the demo corpus: patterns and values that no other language has. `demo_corpus` reads them.

The intents, the slots of each, and the form of a value are those of `demo_phrases`. A pattern is a line, values are
separated by ``|``.
"""

from __future__ import annotations

PATTERNS: dict[str, str] = {
    "set_alarm": """
wake me at {time} {day}
{day} please wake me up at {time}
set my alarm to {time} {day}
i want to be up at {time} {day}
get me up at {time} {day}
{day} i must not sleep past {time} so wake me
alarm at {time} {day} please
make sure that i am awake at {time} {day}
schedule an alarm {day} at {time}
ring the alarm at {time} {day}
""",
    "get_weather": """
how is the weather in {city} {day}
is it going to be sunny in {city} {day}
what is the forecast for {city} {day}
{day} will there be snow in {city}
tell me the temperature in {city} {day}
do i need a coat {day} in {city}
weather report for {city} {day} please
how windy will {city} be {day}
is a storm coming to {city} {day}
{day} how hot will it be in {city}
""",
    "play_music": """
play {artist} {occasion}
i want to hear {artist} {occasion}
{occasion} play something by {artist}
start the music of {artist} {occasion}
could you play me {artist} {occasion}
{occasion} let us listen to {artist}
put {artist} on {occasion}
choose some {artist} songs {occasion}
shuffle the hits of {artist} {occasion}
we need {artist} music {occasion}
""",
    "turn_on_device": """
switch {device} on {room}
start {device} {room}
please turn {device} on {room}
i need {device} {room} now
{room} could you turn on {device}
power up {device} {room}
can {device} {room} be switched on
get {device} {room} running
make sure {device} {room} is on
activate {device} {room} please
""",
    "send_message": """
text {person} that {message}
message {person} and say that {message}
please tell {person} quickly that {message}
inform {person} that {message}
i want {person} to know that {message}
send word to {person} that {message}
drop {person} a line that {message}
remind {person} that {message}
can you write {person} that {message}
let me tell {person} that {message}
""",
    "add_to_list": """
put {item} down on {list}
i need {item} on {list}
write {item} on {list}
include {item} on {list} please
{item} should be on {list}
note {item} on {list}
we are out of {item} so add it to {list}
do not forget {item} on {list}
could you put {item} on {list}
make {item} part of {list}
""",
}


VALUES: dict[str, str] = {
    "time": """
one thirty | two in the afternoon | ten in the morning | eleven fifteen | half past six | seven in the evening
| ten thirty | eleven at night | six in the evening | four in the morning | quarter past eight | two fifteen
| midnight | eleven in the morning | five thirty | eight fifteen
""",
    "day": """
today | tonight | on sunday | this weekend | next monday | in two days | in a week | on new year | next friday
| on my birthday | this thursday | on the second of june | on the fifth of march | in ten days | next week
| on the last of may
""",
    "city": """
oslo | cairo | lisbon | sydney | chicago | dublin | seoul | prague | new york | boston | hamburg | lima | nairobi
| helsinki | toronto | los angeles | budapest | zurich
""",
    "artist": """
adele | prince | miles davis | bjork | shakira | aretha franklin | stevie wonder | johnny cash | dolly parton
| amy winehouse | freddie mercury | beyonce | mozart | louis armstrong | joan baez | cher | leonard cohen | rihanna
""",
    "occasion": """
for bedtime | for the evening | for relaxing | for the road | for my workout | for the baby | for a walk
| for the garden | for homework | for painting | for sleeping | for the barbecue | for the drive
| for our anniversary | for coffee | for my sister | for tea
""",
    "device": """
the oven | the dishwasher | the kettle | the washing machine | the projector | the alarm system | the coffee machine
| the toaster | the monitor | the computer | the vacuum | the dryer | the sprinkler | the doorbell | the screen
| the freezer
""",
    "room": """
in the garage | in the garden | in the cellar | in the library | in the lobby | in the shed | in the playroom
| in the laundry room | in the corridor | on the second floor | on the roof | in the entrance | in the pantry
| on the stairs | in the gym | in your room
""",
    "person": """
my wife | my husband | my son | my daughter | my uncle | my aunt | my doctor | my coach | peter | susan | david
| emma | my cousin | my landlord | lucas | sophie | my best friend
""",
    "message": """
the food is cold | i am stuck in traffic | the party starts soon | the shop is closed | we won the game
| i missed the bus | the baby is asleep | the concert is sold out | i will call back | the work is done
| the door is open | i forgot my phone | the soup is good | the bill is paid
""",
    "item": """
flour | bananas | pasta | soap | salt | chicken | onions | yogurt | potatoes | toothpaste | beans | ice cream
| napkins | lemons | pepper | carrots | black tea | cereal
""",
    "list": """
the grocery list | the work list | the school list | the holiday list | your list | the dinner list | the gift list
| the garden list | the monthly list | the hardware list | the moving list | the lunch list | the pharmacy list
| the baby list
""",
}
