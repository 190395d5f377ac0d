// Words of the page whose contrast to what is behind them is below 4.5 to 1, and that contrast.
() => {
  const rgba = s => { const m = s.match(/[\d.]+/g).map(Number); return [m[0], m[1], m[2], m.length > 3 ? m[3] : 1]; };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const light = c => { const l = c.slice(0, 3).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * l[0] + .7152 * l[1] + .0722 * l[2]; };
  const faint = {};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !e.getClientRects().length || ['STYLE', 'SCRIPT'].includes(e.tagName)) continue;
    const chain = []; let opacity = 1;
    for (let n = e; n; n = n.parentElement) { chain.unshift(n); opacity *= Number(getComputedStyle(n).opacity); }
    if (!opacity) continue;
    let back = [255, 255, 255, 1];
    for (const n of chain) back = over(rgba(getComputedStyle(n).backgroundColor), back);
    const c = rgba(getComputedStyle(e).color); c[3] *= opacity;
    const a = light(over(c, back)), b = light(back);
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) faint[walker.currentNode.textContent.trim().slice(0, 40)] = Number(ratio.toFixed(2));
  }
  return faint;
}
