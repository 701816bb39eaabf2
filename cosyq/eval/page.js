
"use strict";
// One place in an utterance for both sides: the button goes from the one that plays to the other.
const players = [...document.querySelectorAll("audio")];
for (const player of players) {
  player.addEventListener("play", () => players.forEach((other) => other !== player && other.pause()));
}
for (const pair of document.querySelectorAll(".pair")) {
  const button = pair.querySelector("button");
  if (!button) continue;
  const sides = [...pair.querySelectorAll("audio")];
  const show = () => {
    const playing = sides.findIndex((side) => !side.paused);
    button.textContent = ["Play the artifact", "Switch to the reference", "Switch to the artifact"][playing + 1];
  };
  for (const side of sides) for (const event of ["play", "pause", "ended"]) side.addEventListener(event, show);
  button.addEventListener("click", () => {
    const from = sides.find((side) => !side.paused);
    const to = from === sides[0] ? sides[1] : sides[0];
    if (from) {
      from.pause();
      to.currentTime = Math.min(from.currentTime, to.duration || 0);
    }
    to.play();
  });
  button.hidden = false;
}
