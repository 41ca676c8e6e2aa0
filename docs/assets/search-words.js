// The search finds words by their beginnings, so "a" in a question would stand for every word that begins with it. Words that
// say nothing are left out of a question, unless it has no others, or is in quotation marks.
{
  const EMPTY = new Set(
    ("a an and any are as at be by can do does for from has have how i if in is it its me my of on or so that the their " +
      "then there this to was what when where which who why will with you your").split(" "),
  );
  const QUERY = 2; // of the theme's messages to the search
  const send = Worker.prototype.postMessage;
  Worker.prototype.postMessage = function (message, ...rest) {
    if (message?.type === QUERY && typeof message.data === "string" && !message.data.includes('"')) {
      const words = message.data.split(/\s+/);
      const said = words.filter((word) => !EMPTY.has(word.replace(/^\+|\*$/g, "").toLowerCase()));
      if (said.length) message = { ...message, data: said.join(" ") };
    }
    return send.call(this, message, ...rest);
  };
}
