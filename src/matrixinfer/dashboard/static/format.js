// Numbers and times as people read them. Unknown is a dash, which is not zero.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const one = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const clock = new Intl.DateTimeFormat([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });

export const UNKNOWN = "–";
const known = (value) => value !== null && value !== undefined && Number.isFinite(value);

export const count = (value) => (known(value) ? whole.format(value) : UNKNOWN);
export const compact = (value) => (known(value) ? (value < 10_000 ? whole.format(value) : short.format(value)) : UNKNOWN);
export const share = (value) => (known(value) ? `${(value * 100).toFixed(value < 0.9995 && value > 0 ? 1 : 0)} %` : UNKNOWN);
export const roundShare = (value) => (known(value) ? `${Math.round(value * 100)} %` : UNKNOWN);
export const quotient = (part, of) => (of ? part / of : null);
export const axisMilliseconds = (value) => (value >= 1000 ? `${one.format(value / 1000)} s` : `${one.format(value)} ms`);
export const time = (unix) => clock.format(new Date(unix * 1000));
export const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

export function milliseconds(value) {
  if (!known(value)) return UNKNOWN;
  if (value < 10) return `${one.format(value)} ms`;
  return value < 10_000 ? `${whole.format(value)} ms` : `${one.format(value / 1000)} s`;
}

export function duration(seconds) {
  if (!known(seconds)) return UNKNOWN;
  if (seconds < 10) return `${one.format(seconds)} s`;
  if (seconds < 120) return `${whole.format(seconds)} s`;
  const minutes = seconds / 60;
  if (minutes < 120) return `${minutes < 10 ? one.format(minutes) : whole.format(minutes)} min`;
  return `${one.format(minutes / 60)} h`;
}
