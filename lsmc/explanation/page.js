(() => {
  const is = new Map(), use = new Map(), lit = [];
  const add = (map, names, element) => (names || '').split(' ').forEach(n => n && (map.get(n) || map.set(n, []).get(n)).push(element));
  for (const element of document.querySelectorAll('[data-t],[data-u]')) {
    add(is, element.dataset.t, element);
    add(use, element.dataset.u, element);
  }
  const ruler = document.body.appendChild(Object.assign(document.createElement('div'), {id: 'ruler'}));
  let kept = null;
  function clear() {
    for (const element of lit.splice(0)) element.classList.remove('is', 'use');
    for (const count of document.querySelectorAll('i.count, nav i')) count.textContent = '';
    ruler.textContent = '';
  }
  function show(element) {
    clear();
    if (!element) return;
    const names = (element.dataset.t || element.dataset.u).split(' '), seen = new Map();
    const light = (map, kind) => names.forEach(n => (map.get(n) || []).forEach(x => seen.has(x) || seen.set(x, kind)));
    light(is, 'is');
    light(use, 'use');
    const counts = new Map(), up = key => counts.set(key, (counts.get(key) || 0) + 1);
    for (const [x, kind] of seen) {
      x.classList.add(kind);
      lit.push(x);
      if (!x.matches('.l, .node, .stated')) continue;
      if (x.closest('section')) up(x.closest('section').id);
      for (let d = x.closest('details'); d; d = d.parentElement.closest('details')) up(d);
      const place = x.getBoundingClientRect();
      if (place.height) {
        const tick = document.createElement('u');
        tick.style.top = 100 * (place.top + scrollY) / document.documentElement.scrollHeight + '%';
        ruler.append(tick);
      }
    }
    for (const [key, n] of counts) {
      const badge = typeof key === 'string' ? document.querySelector(`nav i[data-count="${key}"]`) : key.querySelector('summary i.count');
      if (badge) badge.textContent = n;
    }
  }
  const at = event => event.target.closest && event.target.closest('[data-t],[data-u]:not(path)');
  document.addEventListener('pointerover', event => kept || show(at(event)));
  document.addEventListener('focusin', event => kept || show(at(event)));
  document.addEventListener('click', event => {
    const element = at(event);
    if (event.target.closest('a, summary') && !element) return;
    kept = element && element !== kept ? element : null;
    show(element);
  });
  document.addEventListener('keydown', event => {
    if (event.key === 'Escape') { kept = null; clear(); }
    if (event.key === 'Enter' && at(event)) { kept = at(event); show(kept); }
  });
})();
