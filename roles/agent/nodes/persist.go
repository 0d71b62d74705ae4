package nodes

import (
	"errors"

	"github.com/sutra-grid/sutra/supervisor"
)

// persist brings what is on disk of an entry to what it is now. Writes of one entry follow each other, and each writes
// what is newest when its turn has come: an older state never replaces a newer one.
func (m *Manager) persist(e *entry) error {
	<-e.writing
	defer func() { e.writing <- struct{}{} }()
	m.mu.Lock()
	version, erased := e.version, e.erased
	rec := recordMessage(e.spec, e.record)
	m.mu.Unlock()
	if version == e.written {
		return nil // the one before wrote it as well
	}
	var err error
	if erased {
		err = errors.Join(m.records.remove(e.id), m.wanted.drop(e.id))
	} else {
		if !e.copied { // what is wanted stays so
			err = m.wanted.keep(rec.GetNode())
			e.copied = err == nil
		}
		err = errors.Join(err, m.records.save(rec))
	}
	if err == nil {
		e.written = version
	}
	return err
}

// note changes what is to be on record of an entry; persist writes it.
func (m *Manager) note(e *entry, change func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	change()
	e.version++
}

// erase removes an entry's record.
func (m *Manager) erase(e *entry) {
	m.note(e, func() { e.erased = true })
	if err := m.persist(e); err != nil {
		m.cfg.Log.Warn().Err(err).Str("node_id", e.id).Msg("record of an ended node not removed; trying on")
		m.mu.Lock()
		defer m.mu.Unlock()
		m.owed = append(m.owed, e)
	}
}

// settle removes the records that are owed. Where an id has come back meanwhile, its new record stands.
func (m *Manager) settle() {
	m.mu.Lock()
	owed := m.owed
	m.owed = nil
	m.mu.Unlock()
	for _, e := range owed {
		erased := make(chan struct{})
		m.mu.Lock()
		again := m.entries[e.id] != nil || m.erasing[e.id] != nil
		if !again {
			m.erasing[e.id] = erased
		}
		m.mu.Unlock()
		if again {
			continue
		}
		m.erase(e)
		m.mu.Lock()
		delete(m.erasing, e.id)
		m.mu.Unlock()
		close(erased)
	}
}

// eraseSoon removes the record of a node that was stopped, without anybody waiting for it: that it was to be stopped is on
// record. Its id can't be taken before.
func (m *Manager) eraseSoon(e *entry) {
	erased := make(chan struct{})
	m.mu.Lock()
	m.erasing[e.id] = erased
	m.mu.Unlock()
	m.erasures.Go(func() {
		m.erase(e)
		m.mu.Lock()
		delete(m.erasing, e.id)
		m.mu.Unlock()
		close(erased)
	})
}

// journal is the manager as the supervisor's journal.
type journal Manager

var _ supervisor.Journal = (*journal)(nil)

// Save writes a unit's record, with what is wanted of its node.
func (j *journal) Save(id string, r supervisor.Record) error {
	m := (*Manager)(j)
	m.mu.Lock()
	e := m.entries[id]
	m.mu.Unlock()
	if e == nil {
		return nil // it ended, and was forgotten, while this was on its way
	}
	m.note(e, func() { e.record = r })
	return m.persist(e)
}
