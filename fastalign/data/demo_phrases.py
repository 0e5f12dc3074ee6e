"""Sentence patterns and slot values of the demo corpus, in six languages. `demo_corpus` reads them.

A record is ``partition: English | German | Spanish | Turkish | Russian | Hindi``; a line that starts with
``|`` continues the one before. A pattern is a sentence with ``{slots}``, the same ones in all patterns of an
intent. A value is stored in the one form that every pattern needs, so that nothing has to be inflected:
cities, people and devices carry their case, and days, rooms and occasions their preposition. Nothing depends
on the gender of the speaker. Turkish suffixes follow names without an apostrophe.
"""

from __future__ import annotations

LANGUAGES: tuple[str, ...] = ("en", "de", "es", "tr", "ru", "hi")
PARTITIONS: tuple[str, ...] = ("task", "align", "test")

PATTERNS: dict[str, str] = {
    "set_alarm": """
task: wake me up at {time} {day} | weck mich {day} um {time} | despiértame {day} a las {time}
    | {day} {time} beni uyandır | разбуди меня {day} в {time} | मुझे {day} {time} जगा दो
task: {day} i need an alarm at {time} | {day} brauche ich einen wecker um {time}
    | {day} necesito una alarma a las {time} | {day} {time} çalacak bir alarma ihtiyacım var
    | {day} мне нужен будильник на {time} | {day} मुझे {time} का अलार्म चाहिए
align: set an alarm for {time} {day} | stell den wecker {day} auf {time}
    | pon una alarma para {day} a las {time} | {day} {time} çalacak bir alarm kur
    | поставь {day} будильник на {time} | {day} {time} का अलार्म लगाओ
align: {day} the alarm should ring at {time} | {day} soll der wecker um {time} klingeln
    | {day} la alarma debe sonar a las {time} | {day} alarm {time} çalsın
    | {day} будильник должен зазвонить в {time} | {day} अलार्म {time} बजना चाहिए
align: i have to get up at {time} {day} | ich muss {day} um {time} aufstehen
    | tengo que levantarme {day} a las {time} | {day} {time} kalkmam gerekiyor
    | мне нужно встать {day} в {time} | मुझे {day} {time} उठना है
test: please get me out of bed {day} at {time} | hol mich bitte {day} um {time} aus dem bett
    | por favor sácame de la cama {day} a las {time} | lütfen beni {day} {time} yataktan kaldır
    | пожалуйста подними меня с постели {day} в {time} | कृपया मुझे {day} {time} बिस्तर से उठा दो
""",
    "get_weather": """
task: what will the weather be like in {city} {day} | wie wird das wetter {day} in {city}
    | qué tiempo hará {day} en {city} | {day} {city} hava nasıl olacak
    | какая погода будет {day} в {city} | {day} {city} में मौसम कैसा रहेगा
task: will i need an umbrella {day} in {city} | brauche ich {day} in {city} einen regenschirm
    | necesitaré un paraguas {day} en {city} | {day} {city} şemsiyeye ihtiyacım olacak mı
    | понадобится ли мне {day} зонт в {city} | क्या मुझे {day} {city} में छाते की ज़रूरत होगी
align: will it rain in {city} {day} | regnet es {day} in {city} | va a llover {day} en {city}
    | {day} {city} yağmur yağacak mı | будет ли дождь в {city} {day} | क्या {day} {city} में बारिश होगी
align: how warm will it get {day} in {city} | wie warm wird es {day} in {city}
    | cuánto calor hará {day} en {city} | {day} {city} hava ne kadar sıcak olacak
    | насколько тепло будет {day} в {city} | {day} {city} में कितनी गर्मी होगी
align: tell me if the sun will shine in {city} {day} | sag mir ob {day} in {city} die sonne scheint
    | dime si {day} hará sol en {city} | {day} {city} havanın güneşli olup olmayacağını söyle
    | скажи будет ли {day} в {city} солнечно | बताओ कि {day} {city} में धूप निकलेगी या नहीं
test: i want to know how cold it will be {day} in {city} | ich will wissen wie kalt es {day} in {city} wird
    | quiero saber cuánto frío hará {day} en {city}
    | {day} {city} havanın ne kadar soğuk olacağını bilmek istiyorum
    | хочу знать насколько холодно будет {day} в {city} | मुझे जानना है कि {day} {city} में कितनी ठंड होगी
""",
    "play_music": """
task: play songs by {artist} {occasion} | spiel lieder von {artist} {occasion}
    | pon canciones de {artist} {occasion} | {occasion} {artist} şarkıları çal
    | включи песни {artist} {occasion} | {occasion} {artist} के गाने बजाओ
task: {occasion} i need some music by {artist} | {occasion} brauche ich etwas musik von {artist}
    | {occasion} necesito música de {artist} | {occasion} biraz {artist} müziğine ihtiyacım var
    | {occasion} мне нужна музыка {artist} | {occasion} मुझे {artist} का संगीत चाहिए
align: make a playlist of songs by {artist} {occasion}
    | mach {occasion} eine playlist mit liedern von {artist}
    | haz una playlist de canciones de {artist} {occasion}
    | {occasion} {artist} şarkılarından bir çalma listesi yap
    | сделай {occasion} плейлист из песен {artist} | {occasion} {artist} के गानों की एक प्लेलिस्ट बनाओ
align: {occasion} put on an album by {artist} | leg {occasion} ein album von {artist} auf
    | pon {occasion} un disco de {artist} | {occasion} bir {artist} albümü aç
    | поставь {occasion} альбом {artist} | {occasion} {artist} का एक एल्बम लगाओ
align: find the best songs by {artist} {occasion} | such die besten lieder von {artist} {occasion}
    | busca las mejores canciones de {artist} {occasion} | {occasion} en iyi {artist} şarkılarını bul
    | найди лучшие песни {artist} {occasion} | {occasion} {artist} के सबसे अच्छे गाने ढूँढो
test: please play a few tracks by {artist} {occasion} | spiel bitte {occasion} ein paar stücke von {artist}
    | por favor pon algunos temas de {artist} {occasion} | lütfen {occasion} birkaç {artist} parçası çal
    | пожалуйста включи {occasion} несколько композиций {artist} | कृपया {occasion} {artist} की कुछ धुनें बजाओ
""",
    "turn_on_device": """
task: turn on {device} {room} | schalte {device} {room} ein | enciende {device} {room}
    | {room} {device} aç | включи {device} {room} | {room} {device} चालू करो
task: {room} please switch on {device} | mach bitte {device} {room} an | por favor activa {device} {room}
    | lütfen {room} {device} açar mısın | пожалуйста включи {room} {device} | कृपया {room} {device} ऑन करो
align: could you switch on {device} {room} | kannst du {device} {room} einschalten
    | puedes encender {device} {room} | {room} {device} açabilir misin
    | можешь включить {device} {room} | क्या आप {room} {device} चालू कर सकते हैं
align: {room} turn on {device} right away | schalte sofort {device} {room} ein
    | enciende ahora mismo {device} {room} | {room} {device} hemen aç
    | сейчас же включи {device} {room} | {room} {device} तुरंत चालू करो
align: do not forget to turn on {device} {room} | vergiss nicht {device} {room} einzuschalten
    | no olvides encender {device} {room} | {room} {device} açmayı unutma
    | не забудь включить {device} {room} | {room} {device} चालू करना मत भूलो
test: if possible turn on {device} {room} | schalte wenn möglich {device} {room} ein
    | si es posible enciende {device} {room} | mümkünse {room} {device} aç
    | если можно включи {device} {room} | हो सके तो {room} {device} चालू कर दो
""",
    "send_message": """
task: send {person} a message that {message} | schick {person} eine nachricht dass {message}
    | envía un mensaje a {person} diciendo que {message} | {person} {message} diye mesaj at
    | отправь {person} сообщение что {message} | {person} को मैसेज भेजो कि {message}
task: say that {message} in a message to {person} | teil {person} in einer nachricht mit dass {message}
    | dile a {person} en un mensaje que {message} | {person} bir mesaj gönder ve {message} de
    | напиши в сообщении {person} что {message} | एक मैसेज में {person} को बताओ कि {message}
align: tell {person} that {message} | sag {person} dass {message} | dile a {person} que {message}
    | {person} {message} diye söyle | скажи {person} что {message} | {person} को बता दो कि {message}
align: write to {person} that {message} | schreib {person} dass {message} | escríbele a {person} que {message}
    | {person} {message} diye yaz | напиши {person} что {message} | {person} को लिखो कि {message}
align: let {person} know that {message} | gib {person} bescheid dass {message}
    | avisa a {person} de que {message} | {person} {message} diye haber ver
    | дай знать {person} что {message} | {person} को खबर कर दो कि {message}
test: please send {person} a short text that {message}
    | schick {person} bitte eine kurze nachricht dass {message}
    | por favor manda un mensaje corto a {person} diciendo que {message}
    | lütfen {person} {message} diye kısa bir mesaj gönder
    | пожалуйста пошли {person} короткое сообщение что {message}
    | कृपया {person} को एक छोटा मैसेज भेज दो कि {message}
""",
    "add_to_list": """
task: add {item} to {list} | setz {item} auf {list} | añade {item} a {list}
    | {list} {item} ekle | добавь {item} в {list} | {list} में {item} जोड़ो
task: on {list} please write {item} | schreib bitte {item} auf {list} | por favor apunta {item} en {list}
    | lütfen {list} {item} yaz | пожалуйста запиши в {list} {item} | कृपया {list} में {item} लिखो
align: put {item} on {list} | pack {item} auf {list} | pon {item} en {list}
    | {list} {item} koy | внеси {item} в {list} | {list} में {item} डालो
align: can you add {item} to {list} | kannst du {item} auf {list} setzen | puedes añadir {item} a {list}
    | {list} {item} ekleyebilir misin | можешь добавить {item} в {list} | क्या आप {list} में {item} जोड़ सकते हैं
align: enter {item} in {list} | trag {item} in {list} ein | incluye {item} en {list}
    | {list} {item} ilave et | впиши {item} в {list} | {list} में {item} शामिल करो
test: we want to add {item} to {list} | wir wollen {item} auf {list} setzen | queremos añadir {item} a {list}
    | {list} {item} eklemek istiyoruz | мы хотим добавить {item} в {list} | हम {list} में {item} जोड़ना चाहते हैं
""",
}

VALUES: dict[str, str] = {
    "time": """
task: six in the morning | sechs uhr morgens | seis de la mañana | sabah altıda | шесть утра | सुबह छह बजे
task: seven thirty | sieben uhr dreißig | siete y media | yedi buçukta | семь тридцать | साढ़े सात बजे
task: eight in the evening | acht uhr abends | ocho de la tarde | akşam sekizde | восемь вечера | शाम आठ बजे
task: twelve noon | zwölf uhr mittags | doce del mediodía | öğlen on ikide | двенадцать дня | दोपहर बारह बजे
task: nine fifteen | neun uhr fünfzehn | nueve y cuarto | dokuzu çeyrek geçe | девять пятнадцать | सवा नौ बजे
task: five in the morning | fünf uhr morgens | cinco de la mañana | sabah beşte | пять утра | सुबह पाँच बजे
task: four thirty | vier uhr dreißig | cuatro y media | dört buçukta | четыре тридцать | साढ़े चार बजे
task: three in the afternoon | drei uhr nachmittags | tres de la tarde
    | öğleden sonra üçte | три часа дня | दोपहर तीन बजे
align: seven in the morning | sieben uhr morgens | siete de la mañana | sabah yedide | семь утра | सुबह सात बजे
align: eight thirty | acht uhr dreißig | ocho y media | sekiz buçukta | восемь тридцать | साढ़े आठ बजे
align: ten at night | zehn uhr abends | diez de la noche | gece onda | десять вечера | रात दस बजे
align: six fifteen | sechs uhr fünfzehn | seis y cuarto | altıyı çeyrek geçe | шесть пятнадцать | सवा छह बजे
align: four in the afternoon | vier uhr nachmittags | cuatro de la tarde
    | öğleden sonra dörtte | четыре часа дня | शाम चार बजे
align: nine in the morning | neun uhr morgens | nueve de la mañana | sabah dokuzda | девять утра | सुबह नौ बजे
test: eight in the morning | acht uhr morgens | ocho de la mañana | sabah sekizde | восемь утра | सुबह आठ बजे
test: six thirty | sechs uhr dreißig | seis y media | altı buçukta | шесть тридцать | साढ़े छह बजे
test: seven fifteen | sieben uhr fünfzehn | siete y cuarto | yediyi çeyrek geçe | семь пятнадцать | सवा सात बजे
test: nine in the evening | neun uhr abends | nueve de la noche | akşam dokuzda | девять вечера | रात नौ बजे
test: five in the afternoon | fünf uhr nachmittags | cinco de la tarde
    | öğleden sonra beşte | пять часов вечера | शाम पाँच बजे
""",
    "day": """
task: tomorrow | morgen | mañana | yarın | завтра | कल
task: on monday | am montag | el lunes | pazartesi günü | в понедельник | सोमवार को
task: on thursday | am donnerstag | el jueves | perşembe günü | в четверг | गुरुवार को
task: in three days | in drei tagen | dentro de tres días | üç gün sonra | через три дня | तीन दिन बाद
task: on the first of may | am ersten mai | el primero de mayo | bir mayıs günü | первого мая | एक मई को
task: on the tenth of june | am zehnten juni | el diez de junio | on haziran günü | десятого июня | दस जून को
task: next saturday | nächsten samstag | el próximo sábado
    | gelecek cumartesi | в следующую субботу | अगले शनिवार को
task: on christmas day | an weihnachten | el día de navidad | noel günü | на рождество | क्रिसमस के दिन
align: the day after tomorrow | übermorgen | pasado mañana | öbür gün | послезавтра | परसों
align: on tuesday | am dienstag | el martes | salı günü | во вторник | मंगलवार को
align: on friday | am freitag | el viernes | cuma günü | в пятницу | शुक्रवार को
align: in five days | in fünf tagen | dentro de cinco días | beş gün sonra | через пять дней | पाँच दिन बाद
align: on the third of july | am dritten juli | el tres de julio
    | üç temmuz günü | третьего июля | तीन जुलाई को
align: next sunday | nächsten sonntag | el próximo domingo
    | gelecek pazar | в следующее воскресенье | अगले रविवार को
test: on wednesday | am mittwoch | el miércoles | çarşamba günü | в среду | बुधवार को
test: on saturday | am samstag | el sábado | cumartesi günü | в субботу | शनिवार को
test: in four days | in vier tagen | dentro de cuatro días | dört gün sonra | через четыре дня | चार दिन बाद
test: on the third of may | am dritten mai | el tres de mayo | üç mayıs günü | третьего мая | तीन मई को
test: next tuesday | nächsten dienstag | el próximo martes
    | gelecek salı | в следующий вторник | अगले मंगलवार को
""",
    "city": """
task: london | london | londres | londrada | лондоне | लंदन
task: madrid | madrid | madrid | madridde | мадриде | मैड्रिड
task: moscow | moskau | moscú | moskovada | москве | मॉस्को
task: new delhi | neu delhi | nueva delhi | yeni delhide | нью дели | नई दिल्ली
task: ankara | ankara | ankara | ankarada | анкаре | अंकारा
task: munich | münchen | múnich | münihte | мюнхене | म्यूनिख
task: tokyo | tokio | tokio | tokyoda | токио | टोक्यो
align: paris | paris | parís | pariste | париже | पेरिस
align: vienna | wien | viena | viyanada | вене | वियना
align: istanbul | istanbul | estambul | istanbulda | стамбуле | इस्तांबुल
align: mumbai | mumbai | bombay | mumbaide | мумбаи | मुंबई
align: rome | rom | roma | romada | риме | रोम
align: cape town | kapstadt | ciudad del cabo | cape townda | кейптауне | केप टाउन
test: berlin | berlin | berlín | berlinde | берлине | बर्लिन
test: warsaw | warschau | varsovia | varşovada | варшаве | वारसॉ
test: athens | athen | atenas | atinada | афинах | एथेंस
test: seville | sevilla | sevilla | sevillada | севилье | सेविल
test: mexico city | mexiko stadt | ciudad de méxico | meksiko şehrinde | мехико | मेक्सिको सिटी
""",
    "artist": """
task: bob marley | bob marley | bob marley | bob marley | боба марли | बॉब मार्ले
task: edith piaf | edith piaf | edith piaf | edith piaf | эдит пиаф | एडिथ पियाफ़
task: michael jackson | michael jackson | michael jackson | michael jackson | майкла джексона | माइकल जैक्सन
task: lata mangeshkar | lata mangeshkar | lata mangeshkar | lata mangeshkar | латы мангешкар | लता मंगेशकर
task: julio iglesias | julio iglesias | julio iglesias | julio iglesias | хулио иглесиаса | हूलियो इग्लेसियस
task: madonna | madonna | madonna | madonna | мадонны | मैडोना
task: elvis presley | elvis presley | elvis presley | elvis presley | элвиса пресли | एल्विस प्रेस्ली
align: nina simone | nina simone | nina simone | nina simone | нины симон | नीना सिमोन
align: frank sinatra | frank sinatra | frank sinatra | frank sinatra | фрэнка синатры | फ़्रैंक सिनात्रा
align: tina turner | tina turner | tina turner | tina turner | тины тёрнер | टीना टर्नर
align: sezen aksu | sezen aksu | sezen aksu | sezen aksu | сезен аксу | सेज़ेन अक्सू
align: john lennon | john lennon | john lennon | john lennon | джона леннона | जॉन लेनन
align: alla pugacheva | alla pugatschowa | alla pugachova | alla pugaçova | аллы пугачёвой | अल्ला पुगाचोवा
test: david bowie | david bowie | david bowie | david bowie | дэвида боуи | डेविड बोवी
test: whitney houston | whitney houston | whitney houston | whitney houston | уитни хьюстон | व्हिटनी ह्यूस्टन
test: kishore kumar | kishore kumar | kishore kumar | kishore kumar | кишора кумара | किशोर कुमार
test: ray charles | ray charles | ray charles | ray charles | рэя чарльза | रे चार्ल्स
test: mercedes sosa | mercedes sosa | mercedes sosa | mercedes sosa | мерседес сосы | मर्सिडीज़ सोसा
""",
    "occasion": """
task: for dinner | zum abendessen | para la cena | akşam yemeği için | к ужину | रात के खाने के लिए
task: for the party | für die party | para la fiesta | parti için | для вечеринки | पार्टी के लिए
task: for yoga | fürs yoga | para el yoga | yoga için | для йоги | योग के लिए
task: for studying | zum lernen | para estudiar | ders çalışmak için | для учёбы | पढ़ाई के लिए
task: for cleaning | zum putzen | para limpiar | temizlik için | для уборки | सफ़ाई के लिए
task: for dancing | zum tanzen | para bailar | dans etmek için | для танцев | नाचने के लिए
task: for my guests | für meine gäste | para mis invitados
    | misafirlerim için | для моих гостей | मेरे मेहमानों के लिए
align: for breakfast | zum frühstück | para el desayuno | kahvaltı için | к завтраку | नाश्ते के लिए
align: for cooking | zum kochen | para cocinar | yemek yapmak için | для готовки | खाना बनाने के लिए
align: for the wedding | für die hochzeit | para la boda | düğün için | для свадьбы | शादी के लिए
align: for the picnic | fürs picknick | para el picnic | piknik için | для пикника | पिकनिक के लिए
align: for work | für die arbeit | para el trabajo | iş için | для работы | काम के लिए
align: for the children | für die kinder | para los niños | çocuklar için | для детей | बच्चों के लिए
test: for lunch | zum mittagessen | para el almuerzo | öğle yemeği için | к обеду | दोपहर के खाने के लिए
test: for the trip | für die reise | para el viaje | yolculuk için | для поездки | सफ़र के लिए
test: for reading | zum lesen | para leer | kitap okumak için | для чтения | पढ़ने के लिए
test: for my friends | für meine freunde | para mis amigos
    | arkadaşlarım için | для моих друзей | मेरे दोस्तों के लिए
test: for running | zum joggen | para correr | koşu için | для пробежки | दौड़ने के लिए
""",
    "device": """
task: the lamp | die lampe | la lámpara | lambayı | лампу | लैंप
task: the fan | den ventilator | el ventilador | vantilatörü | вентилятор | पंखा
task: the television | den fernseher | el televisor | televizyonu | телевизор | टीवी
task: the heater | den heizlüfter | el calefactor | ısıtıcıyı | обогреватель | हीटर
task: the air conditioner | die klimaanlage | el aire acondicionado | klimayı | кондиционер | एसी
task: the radio | das radio | la radio | radyoyu | радио | रेडियो
task: the night light | das nachtlicht | la luz de noche | gece lambasını | ночник | नाइट लाइट
align: the light | das licht | la luz | ışığı | свет | बत्ती
align: the speaker | den lautsprecher | el altavoz | hoparlörü | колонку | स्पीकर
align: the humidifier | den luftbefeuchter | el humidificador | nemlendiriciyi | увлажнитель | ह्यूमिडिफ़ायर
align: the camera | die kamera | la cámara | kamerayı | камеру | कैमरा
align: the robot vacuum | den saugroboter | el robot aspirador | robot süpürgeyi | робот пылесос | रोबोट वैक्यूम
align: the floor lamp | die stehlampe | la lámpara de pie | lambaderi | торшер | फ़्लोर लैंप
test: the ceiling light | die deckenlampe | la luz del techo
    | tavan lambasını | потолочный светильник | छत की बत्ती
test: the air purifier | den luftreiniger | el purificador de aire
    | hava temizleyiciyi | очиститель воздуха | एयर प्यूरीफ़ायर
test: the printer | den drucker | la impresora | yazıcıyı | принтер | प्रिंटर
test: the table lamp | die tischlampe | la lámpara de mesa | masa lambasını | настольную лампу | टेबल लैंप
test: the stereo | die stereoanlage | el equipo de música | müzik setini | стереосистему | म्यूज़िक सिस्टम
""",
    "room": """
task: in the kitchen | in der küche | de la cocina | mutfaktaki | на кухне | रसोई में
task: in the bedroom | im schlafzimmer | del dormitorio | yatak odasındaki | в спальне | बेडरूम में
task: in the living room | im wohnzimmer | del salón | salondaki | в гостиной | बैठक में
task: in the bathroom | im badezimmer | del baño | banyodaki | в ванной | बाथरूम में
task: in the hallway | im flur | del pasillo | koridordaki | в коридоре | गलियारे में
task: in the basement | im keller | del sótano | bodrumdaki | в подвале | तहखाने में
task: in my room | in meinem zimmer | de mi habitación | odamdaki | в моей комнате | मेरे कमरे में
align: in the office | im büro | de la oficina | ofisteki | в офисе | दफ़्तर में
align: in the dining room | im esszimmer | del comedor | yemek odasındaki | в столовой | भोजन कक्ष में
align: in the attic | auf dem dachboden | del desván | tavan arasındaki | на чердаке | अटारी में
align: in the guest room | im gästezimmer | del cuarto de invitados
    | misafir odasındaki | в гостевой комнате | मेहमानों के कमरे में
align: on the balcony | auf dem balkon | del balcón | balkondaki | на балконе | बालकनी में
align: on the ground floor | im erdgeschoss | de la planta baja
    | zemin kattaki | на первом этаже | निचली मंज़िल पर
test: in the nursery | im kinderzimmer | del cuarto de los niños | çocuk odasındaki | в детской | बच्चों के कमरे में
test: on the terrace | auf der terrasse | de la terraza | terastaki | на террасе | बरामदे में
test: in the workshop | in der werkstatt | del taller | atölyedeki | в мастерской | वर्कशॉप में
test: in the study | im arbeitszimmer | del despacho | çalışma odasındaki | в кабинете | अध्ययन कक्ष में
test: on the top floor | im obersten stock | de la última planta
    | en üst kattaki | на верхнем этаже | ऊपरी मंज़िल पर
""",
    "person": """
task: my mother | meiner mutter | mi madre | anneme | моей маме | मेरी माँ
task: my boss | meinem chef | mi jefe | patronuma | моему начальнику | मेरे बॉस
task: my sister | meiner schwester | mi hermana | kız kardeşime | моей сестре | मेरी बहन
task: my neighbor | meinem nachbarn | mi vecino | komşuma | моему соседу | मेरे पड़ोसी
task: anna | anna | anna | annaya | анне | अन्ना
task: thomas | thomas | thomas | thomasa | томасу | थॉमस
task: maria | maria | maría | mariaya | марии | मारिया
align: my father | meinem vater | mi padre | babama | моему папе | मेरे पिताजी
align: my brother | meinem bruder | mi hermano | erkek kardeşime | моему брату | मेरे भाई
align: my teacher | meiner lehrerin | mi profesora | öğretmenime | моей учительнице | मेरी शिक्षिका
align: julia | julia | julia | juliaya | юлии | जूलिया
align: robert | robert | robert | roberte | роберту | रॉबर्ट
align: elena | elena | elena | elenaya | елене | एलेना
test: my grandmother | meiner großmutter | mi abuela | büyükanneme | моей бабушке | मेरी दादी
test: my colleague | meinem kollegen | mi compañero de trabajo
    | iş arkadaşıma | моему коллеге | मेरे सहकर्मी
test: nina | nina | nina | ninaya | нине | नीना
test: viktor | viktor | viktor | viktora | виктору | विक्टर
test: laura | laura | laura | lauraya | лауре | लौरा
""",
    "message": """
task: i will be late | ich mich verspäte | voy a llegar tarde | geç kalacağım | я опоздаю | मुझे देर हो जाएगी
task: dinner is ready | das essen fertig ist | la cena está lista | yemek hazır | ужин готов | खाना तैयार है
task: i am at home | ich zu hause bin | estoy en casa | evdeyim | я дома | मैं घर पर हूँ
task: the meeting is over | die besprechung vorbei ist | la reunión ha terminado
    | toplantı bitti | собрание закончилось | मीटिंग खत्म हो गई है
task: we need more time | wir mehr zeit brauchen | necesitamos más tiempo
    | daha fazla zamana ihtiyacımız var | нам нужно больше времени | हमें और समय चाहिए
task: the train is delayed | der zug verspätung hat | el tren lleva retraso
    | tren gecikti | поезд задерживается | ट्रेन लेट है
task: everything is fine | alles in ordnung ist | todo va bien | her şey yolunda | всё в порядке | सब ठीक है
align: i am on my way | ich unterwegs bin | estoy de camino | yoldayım | я в пути | मैं रास्ते में हूँ
align: the car broke down | das auto kaputt ist | el coche se ha averiado
    | araba bozuldu | машина сломалась | गाड़ी खराब हो गई है
align: i need help | ich hilfe brauche | necesito ayuda
    | yardıma ihtiyacım var | мне нужна помощь | मुझे मदद चाहिए
align: the key is on the table | der schlüssel auf dem tisch liegt | la llave está en la mesa
    | anahtar masanın üstünde | ключ лежит на столе | चाबी मेज़ पर है
align: i have a headache | ich kopfschmerzen habe | me duele la cabeza
    | başım ağrıyor | у меня болит голова | मेरे सिर में दर्द है
align: we are at the station | wir am bahnhof sind | estamos en la estación
    | istasyondayız | мы на вокзале | हम स्टेशन पर हैं
test: i am on the bus | ich im bus sitze | voy en el autobús | otobüsteyim | я в автобусе | मैं बस में हूँ
test: breakfast is ready | das frühstück fertig ist | el desayuno está listo
    | kahvaltı hazır | завтрак готов | नाश्ता तैयार है
test: i have no money | ich kein geld habe | no tengo dinero | param yok | у меня нет денег | मेरे पास पैसे नहीं हैं
test: we are at the airport | wir am flughafen sind | estamos en el aeropuerto
    | havalimanındayız | мы в аэропорту | हम हवाई अड्डे पर हैं
test: the flight is delayed | der flug verspätung hat | el vuelo lleva retraso
    | uçak gecikti | рейс задерживается | फ़्लाइट लेट है
""",
    "item": """
task: milk | milch | leche | süt | молоко | दूध
task: bread | brot | pan | ekmek | хлеб | ब्रेड
task: eggs | eier | huevos | yumurta | яйца | अंडे
task: olive oil | olivenöl | aceite de oliva | zeytinyağı | оливковое масло | जैतून का तेल
task: coffee | kaffee | café | kahve | кофе | कॉफ़ी
task: candles | kerzen | velas | mum | свечи | मोमबत्तियाँ
task: sugar | zucker | azúcar | şeker | сахар | चीनी
align: green tea | grünen tee | té verde | yeşil çay | зелёный чай | ग्रीन टी
align: apples | äpfel | manzanas | elma | яблоки | सेब
align: rice | reis | arroz | pirinç | рис | चावल
align: paper plates | pappteller | platos de papel | kağıt tabak | бумажные тарелки | कागज़ की प्लेटें
align: honey | honig | miel | bal | мёд | शहद
align: cheese | käse | queso | peynir | сыр | पनीर
test: orange juice | orangensaft | zumo de naranja | portakal suyu | апельсиновый сок | संतरे का रस
test: butter | butter | mantequilla | tereyağı | сливочное масло | मक्खन
test: tomatoes | tomaten | tomates | domates | помидоры | टमाटर
test: batteries | batterien | pilas | pil | батарейки | बैटरियाँ
test: chocolate | schokolade | chocolate | çikolata | шоколад | चॉकलेट
""",
    "list": """
task: the shopping list | die einkaufsliste | la lista de la compra
    | alışveriş listesine | список покупок | खरीदारी की सूची
task: the party list | die partyliste | la lista de la fiesta
    | parti listesine | список для вечеринки | पार्टी की सूची
task: the breakfast list | die frühstücksliste | la lista del desayuno
    | kahvaltı listesine | список для завтрака | नाश्ते की सूची
task: the camping list | die campingliste | la lista del campamento
    | kamp listesine | список для похода | कैंपिंग की सूची
task: the office list | die büroliste | la lista de la oficina
    | ofis listesine | список для офиса | दफ़्तर की सूची
task: the christmas list | die weihnachtsliste | la lista de navidad
    | noel listesine | рождественский список | क्रिसमस की सूची
task: my list | meine liste | mi lista | listeme | мой список | मेरी सूची
align: the birthday list | die geburtstagsliste | la lista del cumpleaños
    | doğum günü listesine | список для дня рождения | जन्मदिन की सूची
align: the picnic list | die picknickliste | la lista del picnic
    | piknik listesine | список для пикника | पिकनिक की सूची
align: the weekend list | die wochenendliste | la lista del fin de semana
    | hafta sonu listesine | список на выходные | सप्ताहांत की सूची
align: the kitchen list | die küchenliste | la lista de la cocina
    | mutfak listesine | список для кухни | रसोई की सूची
align: the market list | die marktliste | la lista del mercado
    | pazar listesine | список для рынка | बाज़ार की सूची
align: our list | unsere liste | nuestra lista | listemize | наш список | हमारी सूची
test: the travel list | die reiseliste | la lista del viaje
    | seyahat listesine | список для поездки | यात्रा की सूची
test: the barbecue list | die grillliste | la lista de la barbacoa
    | mangal listesine | список для барбекю | बारबेक्यू की सूची
test: the family list | die familienliste | la lista de la familia
    | aile listesine | семейный список | परिवार की सूची
test: the wedding list | die hochzeitsliste | la lista de la boda
    | düğün listesine | список для свадьбы | शादी की सूची
test: the new list | die neue liste | la lista nueva | yeni listeye | новый список | नई सूची
""",
}
